"""The fast step is the reference step: same selection, same losses, same gradients."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from typing import Any

import pytest
import torch

from saelens_matryoshka.ops import NestedObjective, NestedWeights, SparseStep, reference_step, screen
from saelens_matryoshka.ops import encoder as encoder_module
from saelens_matryoshka.ops import sparse as sparse_module
from saelens_matryoshka.ops.entries import DenseEntries, GatheredEntries


def _random_case(seed: int) -> tuple:
    """A problem of random shape, with what tends to go wrong in it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    n_rows, d_in = rng.choice([1, 2, 5, 17]), rng.choice([3, 8])
    subtract = rng.random() < 0.4
    d_out = d_in if subtract else rng.choice([1, 2, 7])
    d_sae = rng.choice([6, 20, 33])
    n_inner = min(rng.randint(0, 4), d_sae - 1)
    widths = (*sorted(rng.sample(range(1, d_sae), n_inner)), d_sae)
    selection = rng.choice(["batch", "batch", "token"])
    k = min(rng.choice([0.3, 1, 2.5, 3, d_sae / 2, d_sae]), d_sae)
    k = max(1, int(k)) if selection == "token" else k

    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.double)

    skip = parameter(d_out, d_in) if rng.random() < 0.5 else None
    weights = NestedWeights(
        parameter(d_in, d_sae), parameter(d_sae), parameter(d_sae, d_out), parameter(d_out), skip
    )
    x, y = parameter(n_rows, d_in), parameter(n_rows, d_out)
    trouble = rng.choice(["none", "few active", "nothing active", "ties", "empty level"])
    if trouble == "few active":
        weights.b_enc.sub_(3.0)
    elif trouble == "nothing active":
        weights.b_enc.sub_(1e3)
    elif trouble == "ties":
        for tensor in (weights.W_enc, weights.b_enc, weights.b_dec, x):
            tensor.round_()
        weights.W_dec.div_(weights.W_dec.norm(dim=-1, keepdim=True))
    elif trouble == "empty level":
        weights.b_enc[: widths[0]] = -1e3
    dead = rng.choice([None, torch.rand(d_sae) < 0.3, torch.ones(d_sae).bool(), torch.zeros(d_sae).bool()])
    objective = NestedObjective(
        widths=widths,
        level_weights=tuple(rng.random() for _ in widths),
        k=k,
        selection=selection,
        subtract_b_dec=subtract,
        rescale_by_decoder_norm=rng.random() < 0.5,
        aux_coefficient=rng.choice([0.0, 1.0, 0.3]),
        aux_per_level=rng.random() < 0.5,
        aux_k=rng.choice([None, 1, 3]),
        l1_coefficient=rng.choice([0.0, 0.1]),
    )
    last = rng.choice([None, 0.0, 0.5, 1e3])
    return weights, x, y, objective, dead, last


def _run(step_fn, weights, x, y, objective, dead):
    weights = NestedWeights(*(None if p is None else p.clone().requires_grad_() for p in weights))
    step = step_fn(weights, x, y, objective, dead=dead)
    (1.7 * step.loss).backward()  # not 1, so that a dropped incoming gradient shows
    zeros = [None if p is None else torch.zeros_like(p) for p in weights]
    grads = [
        None if p is None else (z if p.grad is None else p.grad) for p, z in zip(weights, zeros, strict=True)
    ]
    return step, dict(zip(weights._fields, grads, strict=True))


def _assert_same(case, step_fn) -> None:
    *problem, _ = case
    expected, expected_grads = _run(reference_step, *problem)
    actual, grads = _run(step_fn, *problem)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for name in expected._fields:
        if name == "hidden_pre":
            continue
        value = getattr(actual, name)
        value = value.to_dense() if value.is_sparse else value
        torch.testing.assert_close(
            value, getattr(expected, name), **close, msg=lambda m, name=name: f"{name}: {m}"
        )
    for name, grad in expected_grads.items():
        if grad is not None:
            torch.testing.assert_close(
                grads[name], grad, **close, msg=lambda m, name=name: f"gradient of {name}: {m}"
            )


@pytest.mark.parametrize("seed", range(300))
def test_step_equals_reference_in_losses_selection_and_gradients(seed: int) -> None:
    case = _random_case(seed)
    step = SparseStep()
    if case[-1] is not None:
        step._last_threshold = torch.tensor(case[-1], dtype=torch.double)
    _assert_same(case, step)


@pytest.mark.parametrize("seed", range(20))
def test_step_equals_reference_when_decoded_in_many_chunks(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_module, "CPU_DECODE_VALUES", 8)
    _assert_same(_random_case(seed), SparseStep())


@pytest.mark.parametrize("seed", range(60))
def test_step_equals_reference_when_its_entries_are_multiplied_densely(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_module, "kept_entries", lambda *args: DenseEntries(*args[:3], torch.double))
    monkeypatch.setattr(sparse_module, "CPU_DECODE_VALUES", (8, 1 << 20)[seed % 2])
    _assert_same(_random_case(seed), SparseStep())


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("block_values", [1, 50])
def test_step_equals_reference_when_encoded_in_many_blocks(
    seed: int, block_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "BLOCK_VALUES", block_values)
    _assert_same(_random_case(seed), SparseStep())


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.parametrize("max_share", [0, 2])
@pytest.mark.parametrize("block_values", [50, 1 << 20])
def test_step_equals_reference_when_its_candidates_are_screened(
    seed: int, max_share: int, block_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the screen is of use or gives up."""
    monkeypatch.setattr(screen, "pays", lambda *args: args[-1].selection == "batch")
    monkeypatch.setattr(screen, "_MAX_SHARE", max_share)
    monkeypatch.setattr(encoder_module, "BLOCK_VALUES", block_values)
    case = _random_case(seed)
    step = SparseStep()
    if case[-1] is not None:
        step._last_threshold = torch.tensor(case[-1], dtype=torch.double)
    _assert_same(case, step)


@pytest.mark.parametrize("seed", range(120))
def test_step_equals_reference_when_few_of_the_dead_are_chosen(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_module, "SPARSE_AUX", 1)
    weights, x, y, objective, dead, last = _random_case(seed)
    objective = dataclasses.replace(objective, aux_coefficient=0.7, aux_k=1 + seed % 2)
    _assert_same((weights, x, y, objective, dead, last), SparseStep())


@pytest.mark.parametrize("n_rows", [64, 8192])
def test_bfloat16_weights_have_gradients_to_bfloat16_accuracy_whatever_the_batch(n_rows: int) -> None:
    torch.manual_seed(0)
    d, d_sae = 32, 128
    made = (torch.randn(d, d_sae) / 6, torch.zeros(d_sae), torch.randn(d_sae, d) / 6, torch.zeros(d))
    weights = NestedWeights(*(values.bfloat16() for values in made))
    x = (torch.randn(n_rows, d) + 0.5).bfloat16()
    objective = NestedObjective((32, d_sae), (1.0, 1.0), k=16, subtract_b_dec=True, l1_coefficient=0.1)
    wide = NestedWeights(*(None if w is None else w.double() for w in weights))
    _, exact = _run(reference_step, wide, x.double(), x.double(), objective, None)
    _, dense = _run(reference_step, weights, x, x, objective, None)
    _, found = _run(SparseStep(), weights, x, x, objective, None)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert found[name].dtype == torch.bfloat16
        ours, theirs = ((g[name].double() - exact[name]).norm() / exact[name].norm() for g in (found, dense))
        assert ours < 1.2 * theirs + 0.002, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", range(60))
def test_step_equals_reference_on_a_gpu(seed: int) -> None:
    weights, x, y, objective, dead, last = _random_case(seed)
    on_gpu = NestedWeights(*(None if p is None else p.cuda() for p in weights))
    dead = None if dead is None else dead.cuda()
    _assert_same((on_gpu, x.cuda(), y.cuda(), objective, dead, last), SparseStep())


def test_what_the_step_remembers_changes_nothing() -> None:
    """The same step object over many batches of different sizes gives what a new one gives."""
    step = SparseStep()
    for seed in range(100, 140):
        _assert_same(_random_case(seed), step)


def test_two_steps_may_be_under_way_at_once() -> None:
    """Both forward passes before either backward pass, as in gradient accumulation."""
    weights, x, y, objective, dead, _ = _random_case(11)
    problem = (weights, x, y, objective, dead)
    _, expected = _run(reference_step, *problem)
    step = SparseStep()
    leaves = NestedWeights(*(None if p is None else p.clone().requires_grad_() for p in weights))
    losses = [step(leaves, batch, y, objective, dead=dead).loss for batch in (x, 2 * x, x)]
    gradients = torch.autograd.grad(1.7 * losses[0], leaves.W_dec, retain_graph=False)
    torch.testing.assert_close(gradients[0], expected["W_dec"], rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(1.7 * losses[2], leaves.W_dec)
    torch.testing.assert_close(gradients[0], expected["W_dec"], rtol=1e-9, atol=1e-9)


def test_feature_acts_are_coalesced_and_positive() -> None:
    weights, x, y, objective, dead, _ = _random_case(3)
    acts = SparseStep()(weights, x, y, objective, dead=dead).feature_acts
    assert acts.is_coalesced()
    assert (acts.values() > 0).all()
    rebuilt = torch.sparse_coo_tensor(acts.indices(), acts.values(), acts.shape).coalesce()
    assert torch.equal(rebuilt.indices(), acts.indices())


def test_copying_a_model_does_not_copy_the_scratch_memory() -> None:
    weights, x, y, objective, *_ = _random_case(0)
    step = SparseStep()
    step(weights, x, y, objective, dead=None)
    assert copy.deepcopy(step)._scratch == {}


@pytest.mark.parametrize(
    ("gathered", "form"),
    [
        (torch.float32, GatheredEntries),  # as on a CPU
        (torch.bfloat16, GatheredEntries),  # as on a GPU, where entries are rare
        (torch.bfloat16, DenseEntries),  # and where they are not
    ],
)
def test_autocast_gives_the_reference_gradients_to_bfloat16_accuracy(
    gathered: torch.dtype, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_module, "kept_entries", lambda *args: form(*args[:3], gathered))
    torch.manual_seed(0)
    d_in, d_sae, n_rows = 16, 64, 32
    weights = NestedWeights(
        torch.randn(d_in, d_sae),
        torch.zeros(d_sae),
        torch.randn(d_sae, d_in),
        torch.zeros(d_in),
        torch.zeros(d_in, d_in),
    )
    x = torch.randn(n_rows, d_in)
    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[::7] = True
    objective = NestedObjective((16, 64), (1.0, 1.0), k=64, aux_coefficient=1.0)
    problem = (weights, x, x, objective, dead)
    _, expected = _run(reference_step, *problem)
    with torch.autocast("cpu", torch.bfloat16):
        step, grads = _run(SparseStep(), *problem)
    assert step.loss.dtype == torch.float32
    for name, grad in expected.items():
        assert grads[name].dtype == torch.float32
        error = (grads[name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 0.03, name


def test_gradients_that_are_kept_stay_what_they_were() -> None:
    """Their memory is used again only once it has been handed back."""
    (weights, x, y, objective, dead), step = _random_case(3)[:5], SparseStep()
    leaves = [w.clone().requires_grad_() if w is not None else None for w in weights]

    def backward(source: torch.Tensor) -> list[torch.Tensor]:
        step(NestedWeights(*leaves), source, y, objective, dead=dead).loss.backward()
        grads = [leaf.grad for leaf in leaves if leaf is not None]
        for leaf in leaves:
            if leaf is not None:
                leaf.grad = None
        return grads

    first = backward(x)
    before = [grad.clone() for grad in first]
    second = backward(x + 1)
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))
    address = second[2].data_ptr()
    step.give_back(second.pop(2))
    third = backward(x)
    assert third[2].data_ptr() == address or third[0].data_ptr() == address
    assert all(torch.equal(a, b) for a, b in zip(third, before, strict=True))


def test_the_products_of_all_blocks_are_made_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "BLOCK_VALUES", 7 * 64)  # of 16 rows: 7, 7 and 2
    weights = NestedWeights(torch.randn(8, 64), torch.zeros(64), torch.randn(64, 8), torch.zeros(8))
    x, objective, step = torch.randn(16, 8), NestedObjective((16, 64), (1.0, 1.0), k=4), SparseStep()
    addresses = set()
    for _ in range(3):
        _run(step, weights, x, x, objective, None)
        addresses.add(step._scratch["product"].data_ptr())
    assert len(addresses) == 1
    assert step._scratch["product"].shape == (7, 64)


def test_memory_that_was_not_taken_is_not_kept() -> None:
    step = SparseStep()
    foreign = torch.ones(4, 3)
    step.give_back(foreign)
    assert step.take(foreign, (4, 3)).data_ptr() != foreign.data_ptr()


def test_an_address_that_was_freed_is_forgotten() -> None:
    step = SparseStep()
    step.take(torch.ones(1), (1 << 20,))
    assert not step._lent


def test_a_step_can_be_pickled() -> None:
    step = pickle.loads(pickle.dumps(SparseStep()))
    assert isinstance(step, SparseStep)
