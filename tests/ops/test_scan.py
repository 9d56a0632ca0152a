from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.ops import scan
from saelens_matryoshka.ops.scan import entries_above


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 7, 50])
def test_entries_are_those_of_a_comparison(
    dtype: torch.dtype, with_bias: bool, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_CACHED_BYTES", 3 * 11 * dtype.itemsize)  # blocks, the last one shorter
    values, bounds = (3 * torch.randn(n_rows, 11)).to(dtype), torch.randn(11).to(dtype)
    bounds[3] = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    bias = torch.randn(11).to(dtype) if with_bias else None
    whole = values if bias is None else values + bias
    expected = (whole > bounds).flatten().nonzero().squeeze(1)
    index, kept = entries_above(values, bounds, bias=bias)
    assert torch.equal(index, expected)
    assert torch.equal(kept, whole.flatten()[expected])
    assert torch.equal(values, whole), "the bias has been added in place"


def test_nothing_is_above() -> None:
    index, kept = entries_above(torch.zeros(4, 5), torch.zeros(5))
    assert index.dtype == torch.long
    assert len(index) == len(kept) == 0
