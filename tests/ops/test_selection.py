from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.ops import Group, NestedObjective, NestedWeights, SparseStep
from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.reference import selection_mask
from saelens_matryoshka.ops.selection import _candidates, select_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norms", [False, True])
def test_selection_equals_full_topk_wherever_the_candidates_begin(
    dtype: torch.dtype, with_norms: bool
) -> None:
    """Also just above, at and just below the threshold, where rounding decides who is a candidate."""
    x, W_enc = torch.randn(64, 16, dtype=dtype), torch.randn(16, 300, dtype=dtype)
    b_enc, norms = torch.randn(300, dtype=dtype), torch.rand(300) + 0.5
    hidden_pre = x @ W_enc + b_enc
    scores = hidden_pre * norms if with_norms else hidden_pre
    expected = selection_mask(scores, 5, "batch")
    threshold = scores[expected].min()
    for offset in torch.linspace(-0.03, 0.03, 121):
        encoder = Encoder(x, W_enc, b_enc, None, lambda *_: None)
        selection = select_batch(
            encoder, norms if with_norms else None, 5, last_threshold=threshold * (1 + offset) / 0.9
        )
        kept = torch.zeros_like(expected)
        kept[selection.rows, selection.columns] = True
        assert torch.equal(kept, expected), offset


def test_selection_finds_what_a_far_too_high_last_threshold_hides() -> None:
    x, W_enc, b_enc = torch.randn(8, 4), torch.randn(4, 50), torch.zeros(50)
    encoder = Encoder(x, W_enc, b_enc, None, lambda *_: None)
    selection = select_batch(encoder, None, 3, last_threshold=torch.tensor(1e6))
    assert len(selection.rows) == 24


def test_blocks_of_rows_keep_together_what_one_process_keeps() -> None:
    """0.7 · 30 · 3 is a little more than 63 as it is computed from the left, and 0.7 · 90 a little less."""

    class OneOfThree(Group):
        row_blocks = 3

    encoder = Encoder(torch.randn(30, 4), torch.randn(4, 50), torch.zeros(50), None, lambda *_: None)
    kept = select_batch(encoder, None, 0.7, last_threshold=None, group=OneOfThree())
    assert len(kept.rows) == int(0.7 * 90) == 62


@pytest.fixture
def n_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates each search has found."""
    numbers: list[int] = []

    def candidates(*args, **options):
        found = _candidates(*args, **options)
        numbers.append(len(found[0]))
        return found

    monkeypatch.setattr("saelens_matryoshka.ops.selection._candidates", candidates)
    return numbers


def test_a_second_search_does_not_keep_half_of_all_scores(n_kept: list[int]) -> None:
    """Beside their indices they would take more memory than the pre-activations themselves."""
    x, W_enc, b_enc = torch.randn(256, 16), torch.randn(16, 1000), torch.zeros(1000)
    encoder = Encoder(x, W_enc, b_enc, None, lambda *_: None)
    assert len(select_batch(encoder, None, 4, last_threshold=torch.tensor(1e6)).rows) == 1024
    assert n_kept[0] == 0
    assert 1024 <= n_kept[1] < 2 * 1024
    assert len(n_kept) == 2


def test_nor_does_the_first_search_after_a_batch_without_a_score(n_kept: list[int]) -> None:
    weights = NestedWeights(
        torch.randn(16, 1000), torch.zeros(1000), torch.randn(1000, 16) / 32, torch.zeros(16)
    )
    step, objective = SparseStep(), NestedObjective((100, 1000), (1.0, 1.0), k=4)
    good = torch.randn(256, 16)
    for x in (good, torch.full_like(good, torch.nan), torch.zeros_like(good)):
        step(weights, x, x, objective, dead=None)
    n_kept.clear()
    step(weights, good, good, objective, dead=None)
    assert len(n_kept) == 1
    assert 1024 <= n_kept[0] < 2 * 1024


def test_a_sample_that_misleads_a_little_does_not_either(
    n_kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W_enc, b_enc = torch.randn(256, 16), torch.randn(16, 1000), torch.zeros(1000)
    expected = selection_mask(x @ W_enc, 4, "batch")
    too_high = (x @ W_enc)[expected].min() * 1.1
    monkeypatch.setattr("saelens_matryoshka.ops.selection._sampled_cutoff", lambda *_: too_high)
    encoder = Encoder(x, W_enc, b_enc, None, lambda *_: None)
    selection = select_batch(encoder, None, 4, last_threshold=None)
    assert torch.equal(torch.stack([selection.rows, selection.columns]), expected.nonzero().T)
    assert n_kept[0] < 1024
    assert max(n_kept) < 256 * 1000 / 20


def test_selection_is_exact_where_the_sample_misleads() -> None:
    """Every row of the sample scores high, and no other."""
    x = torch.full((640, 1), 0.01)
    x[::10] = 100.0
    x += torch.rand(640, 1) * 1e-3
    W_enc, b_enc = torch.rand(1, 40) + 0.5, torch.zeros(40)
    encoder = Encoder(x, W_enc, b_enc, None, lambda *_: None)
    selection = select_batch(encoder, None, 8, last_threshold=torch.tensor(1e6))
    kept = torch.zeros(640, 40, dtype=torch.bool)
    kept[selection.rows, selection.columns] = True
    assert torch.equal(kept, selection_mask(x @ W_enc, 8, "batch"))
