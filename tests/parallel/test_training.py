"""Many processes train as one: the same whole batches give the same losses, weights and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import saelens_matryoshka as sm
from saelens_matryoshka.adam import fuse_adam
from saelens_matryoshka.parallel.dictionary import shard, whole
from saelens_matryoshka.parallel.trainer import parallelize
from saelens_matryoshka.runner import prepare_trainer
from tests.helpers import sparse_batches, trainer_for
from tests.parallel.processes import group_of, run_in_processes

D, D_SAE, BATCH, N_STEPS = 12, 50, 24, 60


def sae_of(case: dict[str, Any]) -> Any:
    """A small dictionary; 50 latents and widths of 7 and 21 fit no shard."""
    case = dict(case)
    kind = case.pop("kind")
    torch.manual_seed(0)
    settings = {
        "d_in": D,
        "d_sae": D_SAE,
        "k": 4,
        "matryoshka_widths": [7, 21, D_SAE],
        "aux_loss_coefficient": 0.5,
        **case,
    }
    if kind == "sae":
        return sm.MatryoshkaTrainingSAE(sm.MatryoshkaTrainingSAEConfig(**settings))
    settings = {"hook_name_out": "target", **settings}
    if kind == "skip":
        return sm.MatryoshkaTrainingSkipTranscoder(sm.MatryoshkaTrainingSkipTranscoderConfig(**settings))
    return sm.MatryoshkaTrainingTranscoder(sm.MatryoshkaTrainingTranscoderConfig(**settings))


def batches_of(kind: str) -> list[torch.Tensor]:
    return sparse_batches(N_STEPS, BATCH, D if kind == "sae" else 2 * D)


def train(case: dict[str, Any], mesh: tuple[int, int] | None) -> dict[str, Any]:
    """Train; what single and many processes must agree on."""
    n_rows, n_latents = mesh or (1, 1)
    sae, batches = sae_of(case), batches_of(case["kind"])
    if mesh is not None:
        group = group_of(n_rows, n_latents, D_SAE)
        if n_latents > 1:
            shard(sae, group, "cpu")
        own = BATCH // (n_rows * n_latents)
        batches = [batch[group.rank * own : (group.rank + 1) * own] for batch in batches]
    trainer = trainer_for(
        sae,
        batches,
        train_batch_size_samples=BATCH,
        total_training_samples=N_STEPS * BATCH,
        dead_feature_window=3,
        lr=3e-3,
    )
    fuse_adam(trainer.optimizer)
    if mesh is not None:
        parallelize(trainer, group)
    if case.get("normalize_activations") == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(D, trainer.data_provider, 2)
    outputs = []
    for batch in trainer.data_provider:
        outputs.append(trainer.step(batch))
        trainer.n_training_steps += 1
    result = {
        "scaling": torch.tensor(trainer.activation_scaler.scaling_factor or 1.0),
        "losses": torch.tensor([output.loss.item() for output in outputs]),
        "mse": torch.stack([output.losses["mse_loss"] for output in outputs]),
        "aux": torch.stack([output.losses["auxiliary_reconstruction_loss"] for output in outputs]),
        "fvu": torch.stack([output.metrics["fvu"]() for output in outputs]),
        "fvu_w7": torch.stack([output.metrics["fvu_w7"]() for output in outputs]),
        "since_fired": trainer.n_forward_passes_since_fired.clone(),
        "frequency": trainer.feature_sparsity,
        "samples": torch.tensor(trainer.n_training_samples),
    }
    sae.calibrate_threshold()
    result["threshold"] = sae.topk_threshold.clone()
    if mesh is None:
        result["weights"] = {name: p.detach().clone() for name, p in sae.named_parameters()}
    else:
        with whole(trainer, group):
            result["weights"] = {name: p.detach().clone() for name, p in sae.named_parameters()}
    return result


CASES = {
    "sae": {"kind": "sae"},
    "sae, l0, no rescaling": {
        "kind": "sae",
        "threshold_calibration": "l0",
        "rescale_acts_by_decoder_norm": False,
        "use_matryoshka_aux_loss": True,
        "apply_b_dec_to_input": True,
    },
    "sae, token": {
        "kind": "sae",
        "selection": "token",
        "threshold_calibration": "l0",
        "l1_coefficient": 0.01,
        "aux_k": 2,
    },
    "transcoder": {"kind": "transcoder", "normalize_activations": "expected_average_only_in"},
    "skip transcoder, ema": {"kind": "skip", "threshold_calibration": "ema", "aux_k": 2},
}


def train_all(mesh: tuple[int, int], cases: list[str]) -> dict[str, Any]:
    return {name: train(CASES[name], mesh) for name in cases}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: train(case, None) for name, case in CASES.items()}


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["data", "dictionary"])
def test_two_processes_train_as_one(mesh: tuple[int, int], alone: dict[str, Any], tmp_path: Path) -> None:
    results = run_in_processes(2, tmp_path, train_all, mesh, list(CASES))
    _assert_all_as_alone(results, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4, 1), (1, 4), (2, 2)], ids=["data", "dictionary", "hybrid"])
def test_four_processes_train_as_one(mesh: tuple[int, int], alone: dict[str, Any], tmp_path: Path) -> None:
    results = run_in_processes(4, tmp_path, train_all, mesh, list(CASES))
    _assert_all_as_alone(results, alone)


def estimate_with_a_bad_batch(mesh: tuple[int, int] | None) -> tuple[float, int]:
    """The scaling factor where the second batch has a NaN in the rows of the first process, and skips."""
    n_rows, n_latents = mesh or (1, 1)
    sae, batches = sae_of(CASES["transcoder"]), batches_of("transcoder")
    batches[1][0, 0] = torch.nan
    sae.finite.may_skip = 1
    if mesh is not None:
        group = group_of(n_rows, n_latents, D_SAE)
        own = BATCH // (n_rows * n_latents)
        batches = [batch[group.rank * own : (group.rank + 1) * own] for batch in batches]
    trainer = trainer_for(sae, batches, train_batch_size_samples=BATCH)
    prepare_trainer(trainer)
    if mesh is not None:
        parallelize(trainer, group)
    with pytest.warns(UserWarning, match="Skipped, 1 of at most 1"):
        trainer.activation_scaler.estimate_scaling_factor(D, trainer.data_provider, 2)
    assert trainer.activation_scaler.scaling_factor is not None
    return trainer.activation_scaler.scaling_factor, sae.finite.n_skipped


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["data", "dictionary"])
def test_all_processes_leave_a_bad_batch_out_of_the_scaling(mesh: tuple[int, int], tmp_path: Path) -> None:
    expected, n_skipped = estimate_with_a_bad_batch(None)
    for found in run_in_processes(2, tmp_path, estimate_with_a_bad_batch, mesh):
        assert found == (pytest.approx(expected, rel=1e-6), n_skipped)


def _assert_all_as_alone(results: list[Any], alone: dict[str, Any]) -> None:
    for name in results[0]:
        expected = alone[name]
        assert expected["aux"].gt(0).any(), name  # some latents died, or their loss is not tested
        for rank, by_case in enumerate(results):
            found = by_case[name]
            for key, value in _flat(expected).items():
                if key.startswith("weights") and rank > 0:  # only the first has the whole
                    continue
                difference = (_flat(found)[key].double() - value.double()).abs()
                worst = (difference / value.double().abs().clamp(min=1)).max().item()
                assert worst < 1e-5, f"{name}: {key} of process {rank} differs by {worst:.1e}"


def _flat(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights = {f"weights {name}": value for name, value in result["weights"].items()}
    return {key: value for key, value in result.items() if key != "weights"} | weights
