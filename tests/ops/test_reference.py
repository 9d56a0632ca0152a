from __future__ import annotations

import dataclasses

import pytest
import torch

from saelens_matryoshka.ops import NestedObjective, NestedWeights, nested_decode, reference_step
from saelens_matryoshka.ops.reference import selection_mask


def _weights(d_in: int, d_sae: int, d_out: int, skip: bool = False) -> NestedWeights:
    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    return NestedWeights(
        parameter(d_in, d_sae),
        parameter(d_sae),
        parameter(d_sae, d_out),
        parameter(d_out),
        parameter(d_out, d_in) if skip else None,
    )


def test_each_level_decodes_its_prefix() -> None:
    W_dec, b_dec, acts = torch.randn(6, 3), torch.randn(3), torch.randn(4, 6)
    levels = nested_decode(acts, W_dec, b_dec, [2, 3, 6])
    for level, width in enumerate([2, 3, 6]):
        torch.testing.assert_close(levels[level], acts[:, :width] @ W_dec[:width] + b_dec)


def test_loss_is_the_weighted_sum_over_levels_summed_over_dimensions_mean_over_rows() -> None:
    weights = _weights(3, 6, 2, skip=True)
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    objective = NestedObjective((2, 6), (0.5, 2.0), k=6, rescale_by_decoder_norm=False)
    step = reference_step(weights, x, y, objective, dead=None)
    acts = (x @ weights.W_enc + weights.b_enc).relu()
    expected = torch.zeros((), dtype=torch.double)
    for weight, width in ((0.5, 2), (2.0, 6)):
        prediction = acts[:, :width] @ weights.W_dec[:width] + weights.b_dec + x @ weights.W_skip.T
        expected = expected + weight * ((prediction - y) ** 2).sum() / 5
    torch.testing.assert_close(step.loss, expected)


def test_gradient_depends_on_the_widths() -> None:
    """A nested loss that is logged but not trained would give the same gradient for any widths."""
    x = torch.randn(16, 4).double()
    gradients = []
    for widths in ((8, 16, 32, 64), (64,)):
        torch.manual_seed(0)
        weights = _weights(4, 64, 4)
        objective = NestedObjective(widths, (1.0,) * len(widths), k=4)
        reference_step(weights, x, x, objective, dead=None).loss.backward()
        gradients.append(weights.W_dec.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_one_selection_for_all_levels() -> None:
    weights = _weights(4, 64, 4)
    x = torch.randn(16, 4).double()
    objective = NestedObjective((8, 64), (1.0, 1.0), k=3)
    one_level = dataclasses.replace(objective, widths=(64,), level_weights=(1.0,))
    kept = [reference_step(weights, x, x, o, dead=None).feature_acts for o in (objective, one_level)]
    assert torch.equal(kept[0], kept[1])
    assert (kept[0] > 0).sum() == 3 * 16


def test_batch_selection_takes_the_largest_of_the_batch_and_ties_by_lower_index() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [2.0, -1.0, 0.5, 2.0]])
    expected = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(selection_mask(scores, 2, "batch"), expected)


def test_token_selection_takes_the_largest_of_each_row() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.1, -1.0, 0.0, -2.0]])
    expected = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(selection_mask(scores, 2, "token"), expected)


def test_only_positive_scores_are_kept() -> None:
    assert not selection_mask(-torch.rand(3, 5), 5, "batch").any()
    assert not selection_mask(torch.zeros(3, 5), 5, "token").any()


@pytest.mark.parametrize("per_level", [False, True])
def test_aux_loss_moves_dead_latents_only(per_level: bool) -> None:
    weights = _weights(4, 12, 4)
    with torch.no_grad():
        weights.b_enc.sub_(100.0)  # nothing is active, so only the auxiliary loss has a gradient
    x = torch.randn(8, 4).double()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 7, 9]] = True
    objective = NestedObjective((6, 12), (1.0, 1.0), k=2, aux_coefficient=1.0, aux_per_level=per_level)
    step = reference_step(weights, x, x, objective, dead=dead)
    step.loss.backward()
    moved = weights.W_dec.grad.abs().sum(dim=1) > 0
    assert moved.any()
    assert not moved[~dead].any()
    assert step.aux_loss > 0


def test_aux_k_dead_latents_learn_the_residual_of_a_row() -> None:
    weights = _weights(4, 12, 6)
    with torch.no_grad():
        weights.b_enc.sub_(100.0)
        weights.b_enc[[2, 5, 8]] = torch.tensor([-3.0, -1.0, -2.0]).double()  # the larger, the rather chosen
        weights.W_enc.zero_()
        weights.W_dec.div_(weights.W_dec.norm(dim=-1, keepdim=True))
    x, y = torch.randn(8, 4).double(), torch.randn(8, 6).double()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 5, 8]] = True
    moved = {}
    for aux_k in (1, 2, None):
        weights.W_dec.grad = None
        objective = NestedObjective((12,), (1.0,), k=1, aux_coefficient=1.0, aux_k=aux_k)
        reference_step(weights, x, y, objective, dead=dead).loss.backward()
        moved[aux_k] = (weights.W_dec.grad.abs().sum(dim=1) > 0).nonzero().squeeze(1).tolist()
    assert moved == {1: [5], 2: [5, 8], None: [2, 5, 8]}  # d_out / 2 = 3
