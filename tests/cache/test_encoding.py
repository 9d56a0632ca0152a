"""What is read from a table is what was written, to the precision of its dtype."""

from __future__ import annotations

import datasets
import pytest
import torch

from saelens_matryoshka.cache.encoding import (
    DTYPES,
    decode,
    encode,
    features,
    from_arrow,
    row_bytes,
    to_arrow,
)


def _rows(n: int = 64, d: int = 24) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    rows[3] = 0.0
    rows[4] *= 1e-30
    rows[5, 7] = 3000.0
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_through_arrow(dtype: str) -> None:
    rows = _rows()
    table = to_arrow({"a.hook": encode(rows, dtype)}, torch.arange(len(rows)), dtype)
    back = decode(from_arrow(table, "a.hook"), torch.float32)
    if dtype == "float32":
        assert torch.equal(back, rows)
    elif dtype == "bfloat16":
        assert torch.equal(back, rows.bfloat16().float())
    else:
        half_a_step = rows.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((back - rows).abs() <= half_a_step * (1 + 1e-5)).all()
    assert table.column("token").to_pylist() == list(range(len(rows)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_has_the_features_and_the_size_that_are_promised(dtype: str) -> None:
    rows = _rows()
    table = to_arrow({"a.hook": encode(rows, dtype)}, torch.arange(len(rows)), dtype)
    assert datasets.Features.from_arrow_schema(table.schema) == features({"a.hook": 24}, dtype)
    assert table.nbytes == len(rows) * row_bytes({"a.hook": 24}, dtype)


def test_a_token_of_zeros_stays_zeros_in_int8() -> None:
    assert torch.equal(decode(encode(torch.zeros(2, 8), "int8"), torch.float32), torch.zeros(2, 8))
