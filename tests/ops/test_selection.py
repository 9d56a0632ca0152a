from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.reference import selection_mask
from saelens_matryoshka.ops.selection import select_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norms", [False, True])
def test_selection_equals_full_topk_wherever_the_candidates_begin(
    dtype: torch.dtype, with_norms: bool
) -> None:
    """Also just above, at and just below the threshold, where rounding decides who is a candidate."""
    x, W_enc = torch.randn(64, 16, dtype=dtype), torch.randn(16, 300, dtype=dtype)
    b_enc, norms = torch.randn(300, dtype=dtype), torch.rand(300) + 0.5
    hidden_pre = torch.addmm(b_enc, x, W_enc)
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
