from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import wandb
from sae_lens import SAE, ActivationsStore, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.evaluation.training_evaluator import CachedEvaluator, HeldOutEvaluator
from tests.evaluation.test_result import RESULT
from tests.helpers import runner_config, transcoder_config

EVALUATED = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=2)


def _sae_config(**overrides: Any) -> sm.MatryoshkaTrainingSAEConfig:
    return sm.MatryoshkaTrainingSAEConfig(
        d_in=128, d_sae=256, k=8, matryoshka_widths=[32, 96, 256], **overrides
    )


CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "transcoder": (transcoder_config, {}),
    "sae": (_sae_config, {"hook_name": "blocks.2.hook_resid_post"}),
}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a run logs to W&B."""
    values: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "log", lambda entry, **_: values.append(entry))
    monkeypatch.setattr(wandb, "log_artifact", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    return values


def _train(
    kind: str, model: HookedTransformer, dataset: datasets.Dataset, sae: dict[str, Any], **overrides: Any
) -> LanguageModelSAETrainingRunner:
    make, settings = CONFIGS[kind]
    torch.manual_seed(0)
    cfg = runner_config(make(**sae), **{**settings, **overrides})
    runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    runner.run()
    return runner


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("calibration", ["ema", "l0"])
@pytest.mark.parametrize(("prefetch", "scaling"), [(False, "none"), (2, "expected_average_only_in")])
def test_a_run_with_evaluations_ends_with_the_weights_of_a_run_without(
    kind: str,
    calibration: str,
    prefetch: Any,
    scaling: str,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    logged: list[dict[str, Any]],
) -> None:
    sae = {"threshold_calibration": calibration, "normalize_activations": scaling}
    shared = {"prefetch_llm_batches": prefetch, "n_batches_for_norm_estimate": 2}
    without = _train(kind, tiny_model, token_dataset, sae, **shared)
    evaluated = _train(kind, tiny_model, token_dataset, sae, logger=EVALUATED, **shared)
    assert sum("held_out/fvu_w256" in entry for entry in logged) == 2
    expected, actual = without.sae.state_dict(), evaluated.sae.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_evaluation_leaves_everything_as_it_was(
    kind: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_and_after: list[tuple[Any, Any]] = []
    stock_call = HeldOutEvaluator.__call__

    def state(sae: Any, store: ActivationsStore) -> list[torch.Tensor]:
        buffers = {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
        position = torch.tensor(store.n_dataset_processed)
        return [torch.get_rng_state(), position, *(tensor.clone() for tensor in buffers.values())]

    def call(self: HeldOutEvaluator, sae: Any, data_provider: Any, scaler: Any) -> Any:
        before = state(sae, data_provider)
        metrics = stock_call(self, sae, data_provider, scaler)
        before_and_after.append((before, state(sae, data_provider)))
        return metrics

    monkeypatch.setattr(HeldOutEvaluator, "__call__", call)
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "log_artifact", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    _train(kind, tiny_model, token_dataset, {"threshold_calibration": "l0"}, logger=EVALUATED)
    assert len(before_and_after) == 2
    for before, after in before_and_after:
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_prefix_is_logged_and_the_whole_under_the_names_of_saelens(
    kind: str,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    logged: list[dict[str, Any]],
) -> None:
    _train(kind, tiny_model, token_dataset, {}, logger=EVALUATED)
    evaluation = next(entry for entry in logged if "held_out/fvu_w256" in entry)
    for name in ("fvu", "l0", "dead_fraction", "ce_recovered", "kl"):
        assert f"held_out/{name}_w32" in evaluation
    score = evaluation["model_performance_preservation"]["ce_loss_score"]
    assert score == evaluation["held_out/ce_recovered_w256"]
    assert evaluation["sparsity"]["l0"] == evaluation["held_out/l0_w256"]
    assert sum("metrics/fvu_w32" in entry for entry in logged) == 4


def test_training_does_not_compute_the_redundancy_that_it_does_not_log(
    tiny_model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = sm.MatryoshkaTrainingSAE(_sae_config())
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    evaluator = HeldOutEvaluator(tiny_model, torch.randint(3, 1000, (4, 16)), 4, False, {})
    assert evaluator.result(sm.inference_model(sae)).prefixes[0].decoder_redundancy is not None
    monkeypatch.delattr("saelens_matryoshka.evaluation.evaluator.decoder_redundancy")
    assert "held_out/fvu_w256" in evaluator(sae, None, ActivationScaler())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_prompts_are_never_trained_on_in_any_epoch(
    kind: str,
    streaming: bool,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained_on: list[torch.Tensor] = []
    stock = ActivationsStore.get_batch_tokens

    def get_batch_tokens(self: ActivationsStore, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = stock(self, *args, **kwargs)
        trained_on.append(tokens)
        return tokens

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", get_batch_tokens)
    prompts = [tuple(map(int, row)) for row in token_dataset[:20]["input_ids"]]
    dataset: Any = token_dataset.select(range(20))
    if streaming:
        dataset = dataset.to_iterable_dataset()
    runner = _train(kind, tiny_model, dataset, {})
    rows = {tuple(row) for row in torch.cat(trained_on).tolist()}
    assert rows == set(prompts[8:])  # two batches of four prompts are held out of all epochs
    evaluator = HeldOutEvaluator.in_place_of(runner.evaluator)
    assert evaluator is not None
    assert [tuple(row) for row in evaluator.tokens.tolist()] == prompts[:8]


@pytest.mark.parametrize("kind", CONFIGS)
def test_too_little_text_to_hold_prompts_out_is_told_only_if_they_are_needed(
    kind: str,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    logged: list[dict[str, Any]],
) -> None:
    small = token_dataset.select(range(8))
    runner = _train(kind, tiny_model, small, {})
    assert HeldOutEvaluator.in_place_of(runner.evaluator) is None
    with pytest.raises(ValueError, match=r"n_eval_batches=2 sets 8 prompts aside.*Lower"):
        _train(kind, tiny_model, small, {}, logger=EVALUATED)
    assert not logged


@pytest.mark.parametrize(
    "architecture", ["matryoshka_sae", "matryoshka_transcoder", "matryoshka_skip_transcoder"]
)
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_what_is_evaluated_is_what_the_end_of_training_would_save(architecture: str, bias: float) -> None:
    """With a gain and an offset that are folded after the scaling of the activations, which they follow."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "d_in": 8, "d_sae": 32, "k": 4, "matryoshka_widths": [8, 32],
        "normalize_activations": "expected_average_only_in",
    }  # fmt: skip
    if architecture != "matryoshka_sae":
        settings |= {"hook_name_out": "blocks.0.hook_mlp_out", "input_gain": "norm_weight"}
    build, config = SAE_TRAINING_CLASS_REGISTRY[architecture]
    sae: Any = build(config(**settings))
    sae.topk_threshold.fill_(0.2)
    if architecture != "matryoshka_sae":
        sae.set_input_gain(torch.rand(8) + 0.5, bias * torch.randn(8))
        sae.source_scale.fill_(1.3)
        sae.target_scale.fill_(0.7)
    if hasattr(sae, "W_skip"):
        sae.W_skip.data.normal_()
    seen = []

    def evaluated(model: SAE[Any], **_: Any) -> EvalResult:
        seen.append(model)
        return RESULT

    evaluator = CachedEvaluator(evaluated)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    evaluator(sae, None, ActivationScaler(scaling_factor=0.25))
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name])
    sae.fold_activation_norm_scaling_factor(0.25)
    x = torch.randn(16, 8)
    saved = sm.inference_model(sae)
    torch.testing.assert_close(seen[0](x), saved(x))
    torch.testing.assert_close(seen[0].encode(x), saved.encode(x))
