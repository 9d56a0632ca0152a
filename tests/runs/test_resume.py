"""A run that was stopped anywhere and resumed ends, to the last bit, as one that never stopped."""

from __future__ import annotations

import itertools
import json
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig, SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.runs.training import RunRunner
from saelens_matryoshka.stopping import RunStopped
from saelens_matryoshka.upkeep.checkpoints import Checkpoints
from saelens_matryoshka.upkeep.keeper import Keeper
from tests.helpers import runner_config, transcoder_config

BATCH, N_STEPS = 96, 14
TRANSCODER_HOOKS = {"hook_name": "blocks.2.ln2.hook_normalized"}
SAE_HOOKS = {"hook_name": "blocks.1.hook_resid_post"}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in ("All samples in the training", "Dataset is not tokenized", "The training dataset"):
            warnings.filterwarnings("ignore", message)
        yield


@pytest.fixture(scope="module")
def text() -> datasets.Dataset:
    documents = [row["text"][:300] for row in tiny.text.dataset("train").select(range(90))]
    return datasets.Dataset.from_dict({"text": documents})


@pytest.fixture
def dataset(text: datasets.Dataset, token_dataset: datasets.Dataset) -> Callable[[str], Any]:
    def make(kind: str) -> Any:
        rows = text if "text" in kind else token_dataset.select(range(90))
        return rows.to_iterable_dataset(num_shards=4) if "streaming" in kind else rows

    return make


def _sae(kind: str) -> Any:
    shared = {"k": 8, "d_sae": 192, "matryoshka_widths": [32, 192], "aux_loss_coefficient": 1 / 32}
    scaled = {"normalize_activations": "expected_average_only_in"}
    if kind == "transcoder":
        return transcoder_config(**shared, **scaled)
    if kind == "skip transcoder":
        settings = {"d_in": 128, "hook_name_out": "blocks.2.hook_mlp_out", "input_gain": "norm_weight"}
        return sm.MatryoshkaTrainingSkipTranscoderConfig(**shared, **settings)
    if kind == "whitened sae":
        scaled = {"normalize_activations": "covariance_whitening"}
    return sm.MatryoshkaTrainingSAEConfig(d_in=128, **shared, **scaled)


def _config(kind: str, folder: Path, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        **(TRANSCODER_HOOKS if "transcoder" in kind else SAE_HOOKS),
        "training_tokens": BATCH * N_STEPS,
        "train_batch_size_tokens": BATCH,
        "n_batches_for_norm_estimate": 3,
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 4,
        "feature_sampling_window": 5,
        "output_path": str(folder / "out"),
        "exclude_special_tokens": True,
    }
    return runner_config(_sae(kind), **{**settings, **overrides})


def _losses(into: dict[int, float]) -> Callable[[SAETrainer[Any, Any], TrainStepOutput], None]:
    def log(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> None:
        into[trainer.n_training_steps] = output.loss.item()

    return log


class Run:
    """A run in a folder that can be started, stopped and started again."""

    def __init__(self, kind: str, dataset: Callable[[], Any], folder: Path, **overrides: Any) -> None:
        self.kind, self.dataset, self.folder, self.overrides = kind, dataset, folder, overrides
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.losses: dict[int, float] = {}

    def start(self, model: Any, *observers: Any, **overrides: Any) -> Any:
        newest = self.checkpoints.newest()
        cfg = _config(self.kind, self.folder, **{**self.overrides, **overrides})
        cfg.checkpoint_path = str(self.checkpoints.folder)
        cfg.resume_from_checkpoint = None if newest is None else str(newest.path)
        torch.manual_seed(0 if newest is None else newest.n_steps)
        self.keeper = Keeper(self.checkpoints, minutes=0)
        self.runner = RunRunner(
            cfg,
            observers=[_losses(self.losses), *observers],
            keeper=self.keeper,
            override_model=model,
            override_dataset=self.dataset(),
        )
        return self.runner.run()

    def result(self) -> tuple[bytes, bytes, dict[int, float]]:
        out = self.folder / "out"
        files = (out / "sae_weights.safetensors", out / "sparsity.safetensors")
        return *(file.read_bytes() for file in files), self.losses


def _at(step: int, action: Callable[[], None]) -> Any:
    def observer(trainer: SAETrainer[Any, Any], _: TrainStepOutput) -> None:
        if trainer.n_training_steps == step:
            action()

    return observer


def _kill() -> None:
    raise Killed


# Four of the sixteen, in which every value of each meets every other's, are run always.
_ALL = itertools.product(["sae", "transcoder"], ["map", "streaming"], ["text", "tokens"], [False, 2])
_FAST = [
    ("sae", "map", "text", False),
    ("sae", "streaming", "tokens", 2),
    ("transcoder", "streaming", "text", False),
    ("transcoder", "map", "tokens", 2),
]
COMBINATIONS = [pytest.param(*one, marks=[] if one in _FAST else [pytest.mark.slow]) for one in _ALL]


@pytest.mark.parametrize(("kind", "form", "content", "prefetch"), COMBINATIONS)
def test_killed_run_ends_as_an_uninterrupted_one(
    kind: str,
    form: str,
    content: str,
    prefetch: Any,
    dataset: Callable[[str], Any],
    tiny_model: HookedTransformer,
    tmp_path: Path,
) -> None:
    settings = {"prefetch_llm_batches": prefetch, "n_checkpoints": 3}
    whole = Run(kind, lambda: dataset(f"{form} {content}"), tmp_path / "whole", **settings)
    whole.start(tiny_model)

    killed = Run(kind, lambda: dataset(f"{form} {content}"), tmp_path / "killed", **settings)
    for step in (3, 7, 12):  # the first before there is a checkpoint
        with pytest.raises(Killed):
            killed.start(tiny_model, _at(step, _kill))
    killed.start(tiny_model)
    assert killed.result() == whole.result()
    assert sorted(whole.losses) == list(range(1, N_STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["skip transcoder", "whitened sae"])
@pytest.mark.parametrize("scheduler", ["cosineannealing", "cosineannealingwarmrestarts"])
def test_stopped_run_ends_as_an_uninterrupted_one(
    kind: str, scheduler: str, dataset: Callable[[str], Any], tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    settings = {"lr_scheduler_name": scheduler, "n_restart_cycles": 2, "lr_end": 1e-4}
    whole = Run(kind, lambda: dataset("text"), tmp_path / "whole", **settings)
    whole.start(tiny_model)
    stopped = Run(kind, lambda: dataset("text"), tmp_path / "stopped", **settings)
    for step in (1, 5, 10, 14):

        def stop() -> None:
            signal.raise_signal(signal.SIGTERM)

        with pytest.raises(RunStopped, match=f"after step {step}, as asked.*of step {step}") as caught:
            stopped.start(tiny_model, _at(step, stop))
        assert caught.value.exit_code == 143
    stopped.start(tiny_model)
    assert stopped.result() == whole.result()


@pytest.mark.parametrize(
    ("kind", "prefetch"),
    [
        ("sae", 1),
        ("transcoder", False),
        pytest.param("sae", False, marks=pytest.mark.slow),
        pytest.param("transcoder", 1, marks=pytest.mark.slow),
    ],
)
def test_saelens_s_own_resume_is_exact_too(
    kind: str, prefetch: Any, dataset: Callable[[str], Any], tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    """With the stock runner and its own checkpoints, `resume_from_checkpoint` and nothing of `runs`."""

    def run(folder: Path, **overrides: Any) -> tuple[Any, bytes]:
        cfg = _config(kind, folder, prefetch_llm_batches=prefetch, **overrides)
        torch.manual_seed(0)
        LanguageModelSAETrainingRunner(
            cfg, override_model=tiny_model, override_dataset=dataset("streaming text")
        ).run()
        return cfg, (folder / "out" / "sae_weights.safetensors").read_bytes()

    cfg, expected = run(tmp_path, n_checkpoints=3, checkpoint_path=str(tmp_path / "checkpoints"))
    written = sorted(int(path.name) for path in Path(cfg.checkpoint_path).iterdir())
    assert len(written) == 3
    for n_tokens in written[:2]:
        newly = tmp_path / f"from {n_tokens}"
        resumed, found = run(
            newly,
            resume_from_checkpoint=str(Path(cfg.checkpoint_path) / str(n_tokens)),
            n_checkpoints=3,
            checkpoint_path=str(newly),
        )
        assert found == expected
        # and not a checkpoint at every step until the passed thresholds are behind it
        again = [int(path.name) for path in Path(resumed.checkpoint_path).iterdir()]
        assert sorted(again) == [n for n in written if n > n_tokens]


def test_an_error_in_the_data_is_saved_before_it_is_told(
    dataset: Callable[[str], Any], tmp_path: Path
) -> None:
    model, n_calls = tiny.load_hooked_transformer(), 0
    whole = Run("transcoder", lambda: dataset("text"), tmp_path / "whole")
    whole.start(model)

    def fail_later(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        nonlocal n_calls
        n_calls += 1
        if n_calls == 12:
            raise ConnectionError("the line is dead")
        return activation

    model.add_hook("blocks.2.hook_mlp_out", fail_later, is_permanent=True)
    failed = Run("transcoder", lambda: dataset("text"), tmp_path / "failed")
    with pytest.raises(RunStopped, match="ConnectionError: the line is dead The last good checkpoint is"):
        failed.start(model)
    newest = failed.checkpoints.newest()
    assert newest is not None
    assert newest.n_steps == max(failed.losses) > 0
    n_calls = 100
    failed.start(model)
    assert failed.result() == whole.result()


def test_wandb_that_fails_does_not_end_the_run(
    dataset: Callable[[str], Any],
    tiny_model: HookedTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    def broken(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001
        raise ConnectionError("no route to host")

    plain = Run("sae", lambda: dataset("tokens"), tmp_path / "plain")
    plain.start(tiny_model)
    monkeypatch.setattr(wandb, "init", lambda **_: monkeypatch.setattr(wandb, "log", broken))
    monkeypatch.setattr(wandb, "log_artifact", broken)
    monkeypatch.setattr(wandb, "finish", broken)
    logger = LoggingConfig(wandb_log_frequency=1, eval_every_n_wandb_logs=7)
    logged = Run("sae", lambda: dataset("tokens"), tmp_path / "logged")
    with pytest.warns(UserWarning, match="no route to host The run goes on") as told:
        logged.start(tiny_model, logger=logger)
    assert any("wandb.finish: ConnectionError" in str(one.message) for one in told)
    assert logged.result() == plain.result()


@pytest.mark.parametrize("kind", [pytest.param("sae", marks=pytest.mark.slow), "transcoder"])
def test_a_checkpoint_changes_nothing(
    kind: str, dataset: Callable[[str], Any], tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    few = Run(kind, lambda: dataset("text"), tmp_path / "few")
    few.start(tiny_model)
    many = Run(kind, lambda: dataset("text"), tmp_path / "many", n_checkpoints=N_STEPS - 1)
    many.start(tiny_model)
    assert many.result() == few.result()


def test_counters_of_a_checkpoint_are_those_of_a_complete_step(
    dataset: Callable[[str], Any], tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    """SAELens saves before it counts the step."""
    cfg = _config("sae", tmp_path, n_checkpoints=3, checkpoint_path=str(tmp_path / "checkpoints"))
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=tiny_model, override_dataset=dataset("tokens")
    )
    runner.run()
    for path in Path(cfg.checkpoint_path).iterdir():
        state = torch.load(path / "trainer_state.pt", weights_only=True)
        assert state["n_training_steps"] == state["n_training_samples"] // BATCH == int(path.name) // BATCH


def test_keyboard_interrupt_twice_stops_at_once(
    dataset: Callable[[str], Any], tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    run, before = Run("sae", lambda: dataset("tokens"), tmp_path), signal.getsignal(signal.SIGINT)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.start(tiny_model, _at(2, twice))
    assert signal.getsignal(signal.SIGINT) is before


def test_observers_see_every_step_once(
    dataset: Callable[[str], Any], tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    seen: list[int] = []
    run = Run("sae", lambda: dataset("tokens"), tmp_path)
    run.start(tiny_model, lambda trainer, _: seen.append(trainer.n_training_steps))
    assert seen == list(range(1, N_STEPS + 1))
    assert json.loads((tmp_path / "out" / "runner_cfg.json").read_text())["resume_from_checkpoint"] is None
