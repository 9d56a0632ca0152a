from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.ops.order import kth_largest, stable_order, true_places


@pytest.mark.parametrize("bound", [1, 2, 12288, 65536, 65537, 1 << 17, 1 << 33])
def test_the_order_is_that_of_a_stable_sort(bound: int) -> None:
    values = torch.randint(0, bound, (3000,))
    values[::3] = values[0]  # ties
    values[-1] = bound - 1
    assert torch.equal(stable_order(values, bound), torch.sort(values, stable=True).indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_the_kth_largest_is_that_of_a_sort(dtype: torch.dtype, k: int) -> None:
    values = torch.randn(4, 30).to(dtype)
    values[:, ::4] = 0.5  # ties
    expected = values.sort(dim=-1, descending=True).values[:, k - 1 : k]
    assert torch.equal(kth_largest(values, k), expected)
    assert torch.equal(kth_largest(values[1], k), expected[1])
    assert torch.equal(kth_largest(values.T.contiguous().T, k), expected), "whatever the layout"


def test_places_of_a_mask_are_those_that_nonzero_gives() -> None:
    mask = torch.rand(300) < 0.4
    assert torch.equal(true_places(mask, int(mask.sum())), mask.nonzero().squeeze(1))
