"""The training step on a pretended GPU: as on the CPU, and how often the host waits in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import saelens_matryoshka as sm
from saelens_matryoshka.ops import (
    ALONE,
    NestedObjective,
    NestedWeights,
    SparseStep,
    bags,
    entries,
    reference_step,
    screen,
)
from saelens_matryoshka.ops import encoder as encoder_module
from saelens_matryoshka.ops import sparse as sparse_module
from saelens_matryoshka.ops.entries import DenseEntries, GatheredEntries
from saelens_matryoshka.ops.order import true_places
from saelens_matryoshka.parallel.processes import _kth_largest
from saelens_matryoshka.runner import prepare_trainer
from tests.helpers import sparse_batches, trainer_for
from tests.ops import test_sparse as on_cpu
from tests.pretend_gpu import PretendGPUs


def _moved(case: tuple) -> tuple:
    weights, x, y, objective, dead, last = case
    weights = NestedWeights(*(None if weight is None else weight.cuda() for weight in weights))
    return weights, x.cuda(), y.cuda(), objective, None if dead is None else dead.cuda(), last


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("seed", range(60))
def test_step_equals_reference(seed: int) -> None:
    case = _moved(on_cpu._random_case(seed))
    step = SparseStep()
    if case[-1] is not None:
        step._last_threshold = torch.tensor(case[-1], dtype=torch.double, device="cuda")
    on_cpu._assert_same(case, step)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("max_share", [0, 2])
def test_step_equals_reference_when_its_candidates_are_screened(
    seed: int, max_share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "pays", lambda *args: args[-1].selection == "batch")
    monkeypatch.setattr(screen, "_MAX_SHARE", max_share)
    case = _moved(on_cpu._random_case(seed))
    on_cpu._assert_same(case, SparseStep())


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("seed", range(60, 80))
def test_step_equals_reference_in_many_blocks_with_few_of_the_dead_chosen(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "BLOCK_VALUES", 50)
    monkeypatch.setattr(sparse_module, "SPARSE_AUX", 1)
    on_cpu._assert_same(_moved(on_cpu._random_case(seed)), SparseStep())


def test_places_of_a_mask_are_found_without_waiting(gpus: PretendGPUs) -> None:
    mask = torch.rand(300) < 0.4
    for mask_of in (mask, ~mask, mask | True, mask & False):
        expected, on_gpu = mask_of.nonzero().squeeze(1), mask_of.cuda()
        with gpus.waiting() as waits:
            found = true_places(on_gpu, len(expected))
        assert not waits
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.long])
def test_the_kth_largest_of_many_processes_is_found_without_waiting(
    dtype: torch.dtype, gpus: PretendGPUs
) -> None:
    values = (1000 * torch.randn(300)).to(dtype)
    on_gpu = values.cuda()
    for k in (1, 40, 300):
        with gpus.waiting() as waits:
            found = _kth_largest(on_gpu, k, ALONE)
        assert not waits
        assert torch.equal(found.cpu(), values.sort(descending=True).values[k - 1])


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_low_precision_is_that_of_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bags, "GATHERED_VALUES", 100)
    made = (torch.randn(16, 64) / 4, torch.zeros(64), torch.randn(64, 16) / 4, torch.zeros(16))
    weights = NestedWeights(*(values.to(dtype) for values in made))
    x = torch.randn(32, 16).to(dtype)
    dead = torch.arange(64) % 7 == 0
    objective = NestedObjective((16, 64), (1.0, 1.0), k=8, subtract_b_dec=True, aux_coefficient=1.0)
    case = (weights, x, x, objective, dead, None)
    _, expected = on_cpu._run(SparseStep(), *case[:-1])
    _, found = on_cpu._run(SparseStep(), *_moved(case)[:-1])
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert found[name].dtype == dtype
        error = (found[name].cpu() - expected[name]).double().norm()
        assert error < 0.01 * expected[name].double().norm(), name


def _steady_waits(gpus: PretendGPUs, *, with_dead: bool, **settings: Any) -> list[str]:
    """What the host waits for in one step of SAELens's trainer, when the first steps are behind."""
    cfg = sm.MatryoshkaTrainingSAEConfig(
        d_in=16, d_sae=64, k=4, matryoshka_widths=[16, 32, 64], device="cuda", **settings
    )
    batches = [batch.cuda() for batch in sparse_batches(12, 64, 16)]
    window = 1 if with_dead else 1000
    trainer = trainer_for(sm.MatryoshkaTrainingSAE(cfg), batches, device="cuda", dead_feature_window=window)
    prepare_trainer(trainer)
    if with_dead:
        trainer.sae.b_enc.data[::5] = -100
    for batch in batches:
        with gpus.waiting() as waits:
            trainer.step(batch)
        trainer.n_training_steps += 1
    assert bool(trainer.dead_neurons.any()) == with_dead
    return [wait.what for wait in waits]


def test_waits_of_a_steady_step(gpus: PretendGPUs) -> None:
    """Which latents are dead, which products may be candidates, which are; whether the step is finite."""
    waits = ["nonzero", "nonzero", "nonzero", "_local_scalar_dense"]
    assert _steady_waits(gpus, with_dead=False) == waits


def test_waits_of_a_step_that_revives_latents(gpus: PretendGPUs) -> None:
    """One more: whether a row has ties among its dead latents."""
    waits = ["nonzero", "nonzero", "nonzero", "nonzero", "_local_scalar_dense"]
    assert _steady_waits(gpus, with_dead=True) == waits


def test_waits_of_a_step_that_revives_latents_level_by_level(gpus: PretendGPUs) -> None:
    """One more: how many dead latents each level has."""
    waits = ["nonzero", "nonzero", "nonzero", "tolist", "_local_scalar_dense"]
    assert _steady_waits(gpus, with_dead=True, use_matryoshka_aux_loss=True) == waits


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("every", "form"), [(1, DenseEntries), (256, GatheredEntries)])
def test_under_autocast_entries_are_multiplied_or_gathered_in_bfloat16(
    every: int, form: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All positive ones are kept, since near a threshold bfloat16 selects others; 1 in `every` may be one."""
    d_sae = 64 * every
    found = []

    def kept_entries(*args: Any) -> Any:
        found.append(entries.kept_entries(*args))
        return found[-1]

    monkeypatch.setattr(sparse_module, "kept_entries", kept_entries)
    b_enc = torch.where(torch.arange(d_sae) % every == 0, 0.0, -100.0)
    values = torch.randn(8, d_sae), b_enc, torch.randn(d_sae, 8) / d_sae, torch.zeros(8)
    x = torch.randn(32, 8)
    objective = NestedObjective((16, d_sae), (1.0, 1.0), k=d_sae)
    _, expected = on_cpu._run(reference_step, NestedWeights(*values), x, x, objective, None)
    weights, x = NestedWeights(*(value.cuda() for value in values)), x.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        _, grads = on_cpu._run(SparseStep(), weights, x, x, objective, None)
    assert type(found[0]) is form
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        error = (grads[name].cpu() - expected[name]).norm() / expected[name].norm()
        assert grads[name].dtype == torch.float32
        assert bool(error < 0.06), name


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("sparse_aux", [1, 1000])
def test_the_backward_pass_under_autocast_does_not_fall_back_to_float16(
    sparse_aux: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAELens's trainer calls it outside of autocast; in float16 the gradients of such a target overflow."""
    monkeypatch.setattr(sparse_module, "SPARSE_AUX", sparse_aux)
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,), "W_skip": (16, 16)}
    values = NestedWeights(**{name: torch.randn(shape) / 4 for name, shape in shapes.items()})
    x, dead = torch.randn(32, 16) * 1e4, torch.arange(64) % 3 == 0
    objective = NestedObjective((16, 64), (1.0, 1.0), k=8, aux_coefficient=1.0, aux_k=4)
    _, expected = on_cpu._run(SparseStep(), values, x, x, objective, dead)
    weights = NestedWeights(*(value.cuda().requires_grad_() for value in values))
    with torch.autocast("cuda", torch.bfloat16):
        step = SparseStep()(weights, x.cuda(), x.cuda(), objective, dead=dead.cuda())
    (1.7 * step.loss).backward()
    for name, weight in zip(weights._fields, weights, strict=True):
        error = (weight.grad.cpu() - expected[name]).norm() / expected[name].norm()
        assert bool(error < 0.06), name
