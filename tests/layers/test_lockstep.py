"""Dictionaries trained in lockstep are those that are trained alone; the language model runs once for all."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, JumpReLUTranscoder, LanguageModelSAETrainingRunner
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.formats.export import export_models
from saelens_matryoshka.layers import LockstepTrainer, ManyHookStore, train_layers
from saelens_matryoshka.layers import lockstep as lockstep_module
from saelens_matryoshka.layers.scaling import estimate_scaling_factors
from saelens_matryoshka.stopping import RunStopped
from saelens_matryoshka.store.resumable import ResumableStore
from saelens_matryoshka.upkeep.checkpoints import Checkpoints
from saelens_matryoshka.upkeep.keeper import Keeper
from tests.helpers import runner_config, transcoder_config


def _transcoder(layer: int, out: Path | None = None, **overrides: Any) -> Any:
    runner = {key: overrides.pop(key) for key in list(overrides) if key in _RUNNER}
    sae = transcoder_config(hook_name_out=f"blocks.{layer}.hook_mlp_out", **overrides)
    path = None if out is None else str(out / f"mlp-{layer}")
    return runner_config(sae, hook_name=f"blocks.{layer}.ln2.hook_normalized", output_path=path, **runner)


_RUNNER = ("lr", "seed", "training_tokens", "train_batch_size_tokens", "n_batches_for_norm_estimate")
_RUNNER += ("prefetch_llm_batches", "use_cached_activations", "cached_activations_path", "n_eval_batches")


def _sae(layer: int, **overrides: Any) -> Any:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=192, k=6, matryoshka_widths=[48, 192])
    return runner_config(sae, hook_name=f"blocks.{layer}.hook_resid_post", **overrides)


def _alone(cfg: Any, model: Any, dataset: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    return {name: value.clone() for name, value in runner.run().state_dict().items()}


def _together(cfgs: dict[str, Any], model: Any, dataset: Any, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    runners = train_layers(cfgs, override_model=model, override_dataset=dataset, **kwargs)
    return {name: dict(runner.sae.state_dict()) for name, runner in runners.items()}


def _assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize_activations": "expected_average_only_in", "n_batches_for_norm_estimate": 2},
        {"prefetch_llm_batches": 2},
    ],
    ids=["plain", "scaled", "prefetching"],
)
def test_each_is_bit_for_bit_the_one_that_is_trained_alone(
    settings: dict[str, Any], tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    layers = (0, 2, 3)
    together = _together(
        {f"mlp-{layer}": _transcoder(layer, **settings) for layer in layers}, tiny_model, token_dataset
    )
    for layer in layers:
        alone = _alone(_transcoder(layer, **settings), tiny_model, token_dataset)
        _assert_same(together[f"mlp-{layer}"], alone)


def _estimates_without_and_with_a_bad_batch(
    cfgs: Callable[[], dict[str, Any]], bad: str, model: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> list[list[Any]]:
    """The activation scalers, where the second of four batches is left out, and where it is bad for one."""
    found: list[list[Any]] = []

    def estimate(trainer: Any, *, is_bad: bool) -> None:
        batches = [
            {name: batch.clone() for name, batch in next(trainer.data_provider).items()} for _ in "abcd"
        ]
        if is_bad:
            batches[1][bad][2, 5] = torch.nan
        else:  # what is then left of that one's batches
            del batches[1]
        provider, trainer.data_provider = trainer.data_provider, iter(batches)
        estimate_scaling_factors(trainer)
        trainer.data_provider = provider
        found.append([copy.copy(one.activation_scaler) for one in trainer.trainers.values()])

    for is_bad in (False, True):
        monkeypatch.setattr(lockstep_module, "estimate_scaling_factors", partial(estimate, is_bad=is_bad))
        with pytest.warns(UserWarning, match="in 1 of .* rows.*Skipped") if is_bad else nullcontext():
            _together(cfgs(), model, dataset, may_skip=1)
    return found


def test_a_bad_batch_is_left_out_of_the_scaling_of_each(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = {"normalize_activations": "expected_average_only_in", "n_batches_for_norm_estimate": 3}
    without, skipped = _estimates_without_and_with_a_bad_batch(
        lambda: {f"mlp-{layer}": _transcoder(layer, **scaled) for layer in (0, 2)},
        "mlp-0",
        tiny_model,
        token_dataset,
        monkeypatch,
    )
    assert skipped[0].scaling_factor == without[0].scaling_factor
    assert skipped[1].scaling_factor != without[1].scaling_factor  # whose first three are good


def test_a_bad_batch_is_left_out_of_the_whitening_of_each(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a dictionary that is scaled by a factor, from the same batches."""

    def cfgs() -> dict[str, Any]:
        made = {f"resid-{layer}": _sae(layer, n_batches_for_norm_estimate=3) for layer in (1, 2, 3)}
        for cfg in list(made.values())[:2]:
            cfg.sae.normalize_activations = "covariance_whitening"
        made["resid-3"].sae.normalize_activations = "expected_average_only_in"
        return made

    without, skipped = _estimates_without_and_with_a_bad_batch(
        cfgs, "resid-1", tiny_model, token_dataset, monkeypatch
    )
    assert torch.equal(skipped[0].whitening.matrix, without[0].whitening.matrix)
    assert not torch.equal(skipped[1].whitening.matrix, without[1].whitening.matrix)  # three are good
    assert skipped[2].whitening is without[2].whitening is None


def test_dictionaries_of_different_kinds_each_learn_what_they_would_alone_on_the_same_batches(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SAE draws other initial weights than a transcoder, so alone it would see another order of rows."""
    cfgs = {
        "sae": _sae(1),
        "mlp": _transcoder(1, lr=3e-3),
        "cross": runner_config(
            transcoder_config(
                hook_name_out="blocks.3.hook_resid_post", input_gain="none", d_sae=64, matryoshka_widths=[64]
            ),
            hook_name="blocks.1.hook_resid_post",
        ),
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in cfgs}
    starts: dict[str, dict[str, torch.Tensor]] = {}

    class Recording(LockstepTrainer):
        def __init__(self, runners: Any, batches: Any) -> None:
            super().__init__(runners, batches)
            for name, trainer in self.trainers.items():
                starts[name] = {key: value.clone() for key, value in trainer.sae.state_dict().items()}
                trainer.step = self._recorded(name, trainer.step)  # type: ignore[method-assign]

        def _recorded(self, name: str, step: Any) -> Any:
            def recorded(batch: torch.Tensor) -> Any:
                seen[name].append(batch.clone())
                return step(batch)

            return recorded

    monkeypatch.setattr(lockstep_module, "LockstepTrainer", Recording)
    together = _together(cfgs, tiny_model, token_dataset)
    for name, cfg in cfgs.items():
        runner = LanguageModelSAETrainingRunner(
            cfg, override_model=tiny_model, override_dataset=token_dataset
        )
        runner.sae.load_state_dict(starts[name])
        runner.activations_store.get_data_loader = lambda name=name: iter(seen[name])  # type: ignore
        _assert_same(together[name], dict(runner.run().state_dict()))
        assert len(seen[name]) == 8


def test_dictionaries_of_the_same_sizes_share_the_buffers_of_their_steps(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfgs = {
        "a": _transcoder(1),
        "b": _transcoder(2),
        "smaller": _transcoder(2, d_sae=128, matryoshka_widths=[128]),
    }
    runners = train_layers(cfgs, override_model=tiny_model, override_dataset=token_dataset)
    batch = cfgs["a"].train_batch_size_tokens

    def product(name: str) -> int:
        sae: Any = runners[name].sae
        buffer = sae.step_fn.scratch("product", torch.device("cpu"), (batch, sae.cfg.d_sae), sae.dtype)
        return buffer.data_ptr()

    assert product("a") == product("b") != product("smaller")


def test_the_language_model_runs_once_per_batch_and_up_to_the_deepest_hook(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run_with_cache = tiny_model.run_with_cache

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append((kwargs["stop_at_layer"], sorted(kwargs["names_filter"])))
        return run_with_cache(*args, **kwargs)

    monkeypatch.setattr(tiny_model, "run_with_cache", counted)
    _together({"a": _transcoder(0)}, tiny_model, token_dataset)
    n_alone = len(calls)
    calls.clear()
    _together({"a": _transcoder(0), "b": _transcoder(2), "c": _sae(1)}, tiny_model, token_dataset)
    assert len(calls) == n_alone
    hooks = [f"blocks.{layer}.{leaf}" for layer in (0, 2) for leaf in ("hook_mlp_out", "ln2.hook_normalized")]
    assert set(map(str, calls)) == {str((3, sorted([*hooks, "blocks.1.hook_resid_post"])))}


def test_a_hook_that_several_read_is_in_the_buffer_once(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[dict[str, int]] = []
    stock = ManyHookStore.get_activations
    monkeypatch.setattr(
        ManyHookStore,
        "get_activations",
        lambda self, tokens: (widths.append(self.widths), stock(self, tokens))[1],
    )
    cfgs = {
        "k8": _transcoder(2),
        "k4": _transcoder(2, k=4),
        "wide": _transcoder(2, d_sae=512, matryoshka_widths=[512]),
    }
    _together(cfgs, tiny_model, token_dataset)
    assert widths[0] == {"blocks.2.ln2.hook_normalized": 128, "blocks.2.hook_mlp_out": 128}


def test_one_head_of_a_hook_is_read(tiny_model: HookedTransformer, token_dataset: datasets.Dataset) -> None:
    d_head = tiny_model.cfg.d_head
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=d_head, d_sae=64, k=4, matryoshka_widths=[64])
    cfgs = [runner_config(sae, hook_name="blocks.1.attn.hook_z", hook_head_index=head) for head in (0, 2)]
    together = _together({"0": cfgs[0], "2": cfgs[1]}, tiny_model, token_dataset)
    for name, cfg in zip(("0", "2"), cfgs, strict=True):
        _assert_same(together[name], _alone(cfg, tiny_model, token_dataset))


@pytest.mark.parametrize(
    ("hook", "head", "has"),
    [("attn.hook_z", 4, "4 heads"), ("attn.hook_z", -1, "4 heads"), ("hook_mlp_out", 0, "no heads")],
)
def test_a_head_that_a_hook_does_not_have_is_refused(
    hook: str, head: int, has: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=32, d_sae=64, k=4, matryoshka_widths=[64])
    cfg = runner_config(sae, hook_name=f"blocks.1.{hook}", hook_head_index=head)
    for run in (_alone, lambda cfg, *with_: _together({"one": cfg}, *with_)):
        with pytest.raises(ValueError, match=f"hook_head_index={head}, but hook '{cfg.hook_name}' has {has}"):
            run(cfg, tiny_model, token_dataset)


# ---- folders


def test_every_folder_is_saelens_own_and_the_parent_is_a_circuit_tracer_set(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "graphs"
    cfgs = {f"mlp-{layer}": _transcoder(layer, runs) for layer in range(4)}
    _together(cfgs, tiny_model, token_dataset)
    for layer in range(4):
        loaded = SAE.load_from_disk(runs / f"mlp-{layer}")
        assert type(loaded) is JumpReLUTranscoder
        assert loaded.cfg.metadata.hook_name == f"blocks.{layer}.ln2.hook_normalized"
        assert loaded.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"
        assert loaded.cfg.metadata.input_frame == "normalized"
        assert {path.name for path in (runs / f"mlp-{layer}").iterdir()} >= {
            "runner_cfg.json",
            "sparsity.safetensors",
        }
    export_models(runs, "circuit-tracer", out)
    assert {path.name for path in out.iterdir()} >= {f"layer_{layer}.safetensors" for layer in range(4)}


def test_what_is_finished_is_left_out_and_the_others_do_not_change(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    _together({"mlp-0": _transcoder(0, tmp_path)}, tiny_model, token_dataset)
    weights = tmp_path / "mlp-0" / SAE_WEIGHTS_FILENAME
    before = weights.stat().st_mtime_ns
    cfgs = {f"mlp-{layer}": _transcoder(layer, tmp_path) for layer in (0, 1)}
    assert list(_together(cfgs, tiny_model, token_dataset)) == ["mlp-1"]
    assert weights.stat().st_mtime_ns == before
    alone = tmp_path / "alone"
    _alone(_transcoder(1, alone), tiny_model, token_dataset)
    _assert_same(
        load_file(tmp_path / "mlp-1" / SAE_WEIGHTS_FILENAME),
        load_file(alone / "mlp-1" / SAE_WEIGHTS_FILENAME),
    )
    assert _together(cfgs, tiny_model, token_dataset) == {}


def test_another_result_in_one_of_the_folders_is_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    _together({"mlp-0": _transcoder(0, tmp_path)}, tiny_model, token_dataset)
    cfgs = {"mlp-0": _transcoder(0, tmp_path, k=4), "mlp-1": _transcoder(1, tmp_path)}
    with pytest.raises(ValueError, match=r"mlp-0: output_path=.*another run \(sae.k: 8"):
        _together(cfgs, tiny_model, token_dataset)
    assert not (tmp_path / "mlp-1").exists()


# ---- stopping and going on


def _stopping(keeper: Keeper, at: int) -> Any:
    def stop(trainer: Any, output: Any) -> None:  # noqa: ARG001
        if trainer.n_training_steps == at:
            keeper.stop.number = 15

    return stop


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_last_bit(
    prefetch: int, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    def cfgs() -> dict[str, Any]:
        return {f"mlp-{layer}": _transcoder(layer, prefetch_llm_batches=prefetch) for layer in (0, 2)}

    straight = _together(cfgs(), tiny_model, token_dataset)
    keeper = Keeper(Checkpoints(tmp_path / "checkpoints"), minutes=0)
    with pytest.raises(RunStopped, match="after step 5"):
        _together(
            cfgs(), tiny_model, token_dataset, keeper=keeper, observers={"mlp-0": [_stopping(keeper, 5)]}
        )
    newest = Checkpoints(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.n_steps == 5
    resumed = _together(cfgs(), tiny_model, token_dataset, seed=99, resume_from=newest.path)
    for name in straight:
        _assert_same(resumed[name], straight[name])


def _stopped_after_3_steps(
    cfgs: dict[str, Any], model: HookedTransformer, tokens: datasets.Dataset, folder: Path
) -> Path:
    """The checkpoint of runs that were stopped."""
    keeper = Keeper(Checkpoints(folder), minutes=0)
    with pytest.raises(RunStopped):
        _together(cfgs, model, tokens, keeper=keeper, observers={"mlp-0": [_stopping(keeper, 3)]})
    newest = Checkpoints(folder).newest()
    assert newest is not None
    return newest.path


def test_some_of_a_checkpoint_may_go_on_without_the_others(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    """Those that had been saved when the process ended are not trained again."""
    cfgs = {f"mlp-{layer}": _transcoder(layer) for layer in (0, 2)}
    straight = _together(cfgs, tiny_model, token_dataset)
    stopped = _stopped_after_3_steps(cfgs, tiny_model, token_dataset, tmp_path)
    resumed = _together({"mlp-2": cfgs["mlp-2"]}, tiny_model, token_dataset, resume_from=stopped)
    _assert_same(resumed["mlp-2"], straight["mlp-2"])
    with pytest.raises((ValueError, FileNotFoundError), match="mlp-1"):
        _together({"mlp-1": _transcoder(1)}, tiny_model, token_dataset, resume_from=stopped)


def test_each_goes_on_with_its_own_hook_when_they_are_named_in_another_order(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    """Those of a folder come in the order of their names, in which mlp-10 is before mlp-2."""
    cfgs = {f"mlp-{layer}": _transcoder(layer) for layer in (2, 0)}
    straight = _together(cfgs, tiny_model, token_dataset)
    stopped = _stopped_after_3_steps(cfgs, tiny_model, token_dataset, tmp_path)
    turned = dict(reversed(cfgs.items()))
    resumed = _together(turned, tiny_model, token_dataset, resume_from=stopped)
    for name in straight:
        _assert_same(resumed[name], straight[name])


def test_a_prefetcher_gets_no_rows_of_a_checkpoint_s_other_hooks(
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfgs = {f"mlp-{layer}": _transcoder(layer, prefetch_llm_batches=4) for layer in (0, 2)}
    straight = _together(cfgs, tiny_model, token_dataset)
    keeper = Keeper(Checkpoints(tmp_path), minutes=0)
    with pytest.raises(RunStopped):
        _together(cfgs, tiny_model, token_dataset, keeper=keeper, observers={"mlp-0": [_stopping(keeper, 3)]})
    load = ResumableStore.load_from_checkpoint

    def load_slowly(store: ResumableStore, path: Path) -> None:
        load(store, path)
        time.sleep(0.1)

    monkeypatch.setattr(ResumableStore, "load_from_checkpoint", load_slowly)
    newest = Checkpoints(tmp_path).newest()
    assert newest is not None
    resumed = _together({"mlp-2": cfgs["mlp-2"]}, tiny_model, token_dataset, resume_from=newest.path)
    _assert_same(resumed["mlp-2"], straight["mlp-2"])


@pytest.mark.parametrize(("failing", "said"), [("step", "There is no checkpoint yet"), ("data", "of step 3")])
def test_a_step_that_some_have_done_and_others_not_is_not_saved(
    failing: str,
    said: str,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(LockstepTrainer):
        def __init__(self, runners: Any, batches: Any) -> None:
            super().__init__(runners, batches)
            if failing == "data":
                self.data_provider = map(self._fail_at_fourth, batches)
            else:
                second = self.trainers["mlp-2"]
                step = second.step
                second.step = lambda batch: step(self._fail_at_fourth(batch))  # type: ignore[method-assign]

        def _fail_at_fourth(self, batch: Any) -> Any:
            if self.n_training_steps == 3:
                raise RuntimeError("out of memory")
            return batch

    monkeypatch.setattr(lockstep_module, "LockstepTrainer", Failing)
    cfgs = {f"mlp-{layer}": _transcoder(layer) for layer in (0, 2)}
    with pytest.raises(RunStopped, match=f"out of memory .*{said}"):
        _together(cfgs, tiny_model, token_dataset, keeper=Keeper(Checkpoints(tmp_path), minutes=0))


def test_a_damaged_part_of_a_checkpoint_is_noticed(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    cfgs = {f"mlp-{layer}": _transcoder(layer) for layer in (0, 2)}
    _together(cfgs, tiny_model, token_dataset, keeper=Keeper(checkpoints, minutes=0))
    newest = checkpoints.newest()
    assert newest is not None
    with (newest.path / "mlp-2" / SAE_WEIGHTS_FILENAME).open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff")
    with pytest.warns(UserWarning, match="mlp-2/sae_weights.safetensors is damaged"):
        assert checkpoints.newest() is None


def test_wandb_that_does_not_start_leaves_no_prefetcher_running(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(lockstep_module.wandb, "init", refuse)
    cfg = _transcoder(1, prefetch_llm_batches=2)
    cfg.logger.log_to_wandb = True
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="not logged in"):
        _together({"mlp-1": cfg}, tiny_model, token_dataset)
    assert threading.active_count() == before


# ---- what is observed, and refused


def test_every_dictionary_has_its_own_observers_and_evaluation(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    trainers: list[LockstepTrainer] = []

    def observer(name: str) -> Any:
        def observed(trainer: Any, output: Any) -> None:  # noqa: ARG001
            steps[name].append((trainer.n_training_steps, trainer.n_training_samples))

        return observed

    class Kept(LockstepTrainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            trainers.append(self)

    monkeypatch.setattr(lockstep_module, "LockstepTrainer", Kept)
    cfgs = {"a": _transcoder(0), "b": _transcoder(1)}
    _together(cfgs, tiny_model, token_dataset, observers={name: [observer(name)] for name in cfgs})
    assert steps["a"] == steps["b"] == [(step, 128 * step) for step in range(1, 9)]
    (trainer,) = trainers
    scalers = {name: one.activation_scaler for name, one in trainer.trainers.items()}
    logged = trainer._evaluate(trainer.saes, trainer.data_provider, scalers, {})
    assert logged["a/held_out/fvu_w256"] != logged["b/held_out/fvu_w256"]
    assert 0 < logged["b/held_out/fvu_w256"] < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_tokens": 256}, "training_tokens.*share it, and 'a' has 1024 and 'b' 256"),
        ({"train_batch_size_tokens": 64}, "train_batch_size_tokens"),
        ({"d_in": 64, "d_out": 128}, "b: d_in=64, but hook"),
        ({"hook_name_out": "blocks.0.hook_mlp_out"}, "b: hook_name_out=.* is computed before"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    change: dict[str, Any], message: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    settings = {**change}
    hook_name_out = settings.pop("hook_name_out", "blocks.1.hook_mlp_out")
    runner = {key: settings.pop(key) for key in list(settings) if key in _RUNNER}
    sae = transcoder_config(hook_name_out=hook_name_out, **settings)
    other = runner_config(sae, hook_name="blocks.1.ln2.hook_normalized", **runner)
    with pytest.raises(ValueError, match=message):
        _together({"a": _transcoder(0), "b": other}, tiny_model, token_dataset)


def test_two_results_in_one_folder_are_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    cfgs = {"a": _transcoder(0, tmp_path), "b": _transcoder(0, tmp_path)}
    with pytest.raises(ValueError, match="output_path: 'a' and 'b' have the same"):
        _together(cfgs, tiny_model, token_dataset)


# ---- from a cache


@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in"])
def test_from_a_cache_each_is_the_one_that_is_trained_alone_from_it(scaling: str, cache_folder: Path) -> None:
    """Also those of different kinds: the order of a cache's rows is a function of the seed."""
    from saelens_matryoshka.cache import CachedModel, open_cache

    cached: dict[str, Any] = {"use_cached_activations": True, "cached_activations_path": str(cache_folder)}
    cached["n_batches_for_norm_estimate"] = 3
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=192, k=6, matryoshka_widths=[48, 192])
    cfgs = {
        "mlp": _transcoder(2, normalize_activations=scaling, **cached),
        "sae": runner_config(sae, hook_name="blocks.2.hook_mlp_out", **cached),
        "small": _transcoder(2, k=4, d_sae=64, matryoshka_widths=[64], **cached),
    }
    together = _together(cfgs, None, None)
    model = CachedModel(open_cache(cache_folder))
    for name, cfg in cfgs.items():
        _assert_same(together[name], _alone(cfg, model, None))
