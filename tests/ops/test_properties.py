"""Properties of selection and nested step, for any sizes: one row, one latent, nothing kept, all tied."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from saelens_matryoshka.ops import NestedObjective, NestedWeights, SparseStep, nested_decode, reference_step
from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.reference import selection_mask
from saelens_matryoshka.ops.selection import Selection, select_batch, select_token


class Case(NamedTuple):
    """Sizes, and whether values are few (so that many are equal)."""

    n_rows: int
    d: int
    sizes: list[int]
    tied: bool
    seed: int

    @property
    def d_sae(self) -> int:
        return sum(self.sizes)

    def normal(self, *shape: int, salt: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(31 * self.seed + salt)
        values = torch.randn(*shape, generator=generator, dtype=torch.double)
        return values.round() if self.tied else values


cases = st.builds(
    Case,
    st.integers(1, 9),
    st.integers(1, 5),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 1 << 16),
)


def _encoder(case: Case) -> tuple[Encoder, torch.Tensor]:
    x, W_enc = case.normal(case.n_rows, case.d), case.normal(case.d, case.d_sae, salt=1)
    b_enc = case.normal(case.d_sae, salt=2)
    return Encoder(x, W_enc, b_enc, None, lambda *_: None), x @ W_enc + b_enc


def _mask(selection: Selection, shape: torch.Size) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[selection.rows, selection.columns] = True
    return mask


@given(
    cases,
    st.floats(0.01, 8),
    st.booleans(),
    st.none() | st.floats(-2, 50) | st.sampled_from([0.0, float("inf")]),
)
@example(case=Case(1, 1, [1], True, 5), k=1.0, with_norms=False, remembered=-1.0)
def test_batch_selection_is_the_full_top_k_whatever_was_remembered(
    case: Case, k: float, with_norms: bool, remembered: float | None
) -> None:
    k = min(k, case.d_sae)
    encoder, hidden_pre = _encoder(case)
    norms = case.normal(case.d_sae, salt=3).abs() if with_norms else None
    last = None if remembered is None else torch.tensor(remembered, dtype=torch.double)
    selection = select_batch(encoder, norms, k, last_threshold=last)
    scores = hidden_pre if norms is None else hidden_pre * norms
    expected = selection_mask(scores, k, "batch")
    assert torch.equal(_mask(selection, scores.shape), expected)
    assert len(selection.rows) <= int(k * case.n_rows)
    assert torch.equal(selection.scores, scores[expected])
    smallest = scores[expected].min() if expected.any() else scores.new_zeros(())
    assert torch.equal(selection.batch_threshold, smallest)


@given(cases, st.integers(1, 12), st.booleans())
def test_token_selection_is_the_top_k_of_every_row(case: Case, k: int, with_norms: bool) -> None:
    k = min(k, case.d_sae)
    encoder, hidden_pre = _encoder(case)
    norms = case.normal(case.d_sae, salt=3).abs() if with_norms else None
    scores = hidden_pre if norms is None else hidden_pre * norms
    mask = _mask(select_token(encoder, norms, k), scores.shape)
    assert torch.equal(mask, selection_mask(scores, k, "token"))
    assert int(mask.sum(dim=-1).max()) <= k


@given(cases)
def test_a_level_is_the_decode_of_its_prefix_and_depends_on_nothing_after_it(case: Case) -> None:
    widths = list(accumulate(case.sizes))
    acts, W_dec = case.normal(case.n_rows, case.d_sae).relu(), case.normal(case.d_sae, case.d, salt=1)
    b_dec = case.normal(case.d, salt=2)
    levels = nested_decode(acts, W_dec, b_dec, widths)
    assert levels.shape == (len(widths), case.n_rows, case.d)
    for width, level in zip(widths, levels, strict=True):
        torch.testing.assert_close(level, acts[:, :width] @ W_dec[:width] + b_dec)
    changed = acts.clone()
    changed[:, widths[0] :] += 7
    assert torch.equal(nested_decode(changed, W_dec, b_dec, widths)[0], levels[0])


@given(
    cases,
    st.floats(0.01, 6),
    st.sampled_from(["batch", "token"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.03]),
    st.integers(1, 5),
)
def test_the_fast_step_is_the_reference_in_losses_and_gradients(
    case: Case, k: float, selection: str, rescale: bool, skip: bool, aux: float, d_out: int
) -> None:
    case = case._replace(tied=False)  # the gradient at a tie depends on rounding
    k = max(1, int(min(k, case.d_sae))) if selection == "token" else min(k, case.d_sae)
    objective = NestedObjective(
        tuple(accumulate(case.sizes)),
        tuple(1.0 / (level + 1) for level in range(len(case.sizes))),
        k,
        selection,  # type: ignore[arg-type]
        rescale_by_decoder_norm=rescale,
        aux_coefficient=aux,
        aux_per_level=case.seed % 2 == 0,
        l1_coefficient=0.01,
    )
    x, y = case.normal(case.n_rows, case.d), case.normal(case.n_rows, d_out, salt=9)
    dead = case.normal(case.d_sae, salt=8) > 0
    results = []
    for step in (reference_step, SparseStep()):
        shapes = [(case.d, case.d_sae), (case.d_sae,), (case.d_sae, d_out), (d_out,)]
        made = [case.normal(*shape, salt=i).requires_grad_() for i, shape in enumerate(shapes)]
        W_skip = case.normal(d_out, case.d, salt=7).requires_grad_() if skip else None
        weights = NestedWeights(*made, W_skip)
        done = step(weights, x, y, objective, dead=dead)
        done.loss.backward()
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights if w is not None]
        results.append((done, gradients))
    (expected, expected_gradients), (found, gradients) = results
    for name in ("loss", "level_losses", "aux_loss", "l1_loss", "prediction", "batch_threshold"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    assert torch.equal(found.feature_acts.to_dense() > 0, expected.feature_acts > 0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)
