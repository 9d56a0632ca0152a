from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.ops.bags import bag_sums, gathered_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def _bags(
    dtype: torch.dtype, n_bags: int = 7, n: int = 40, m: int = 5, d: int = 3
) -> tuple[torch.Tensor, ...]:
    """Some empty, an entry of the table several times in one."""
    bag = torch.randint(1, n_bags - 1, (n,)).sort().values
    offsets = torch.searchsorted(bag, torch.arange(n_bags + 1))
    return torch.randint(0, m, (n,)), torch.randn(m, d, dtype=dtype), offsets, torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_memory", [False, True])
@pytest.mark.parametrize("capability", ["scattered, AVX512", "scattered, AVX2", None])
def test_bag_sums_are_those_of_a_loop(
    dtype: torch.dtype, given_memory: bool, capability: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capability is not None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability.split()[1])
    index, table, offsets, factors = _bags(dtype)
    out = torch.full((7, 3), torch.nan, dtype=dtype) if given_memory else None
    sums = bag_sums(index, table, offsets, factors, out=out, scattered=capability is not None)
    for bag in range(7):
        entries = slice(int(offsets[bag]), int(offsets[bag + 1]))
        expected = (factors[entries, None].double() * table[index[entries]].double()).sum(dim=0)
        torch.testing.assert_close(
            sums[bag].double(),
            expected,
            rtol=3e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=3e-2 if dtype == torch.bfloat16 else 1e-5,
        )


def test_without_mkl_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bags = _bags(torch.float32)
    with_it = bag_sums(*bags)
    monkeypatch.setattr("saelens_matryoshka.ops.bags._product_dtypes", tuple)
    torch.testing.assert_close(bag_sums(*bags), with_it)


def test_without_entries_every_sum_is_zero() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    sums = bag_sums(nothing, torch.randn(5, 3), torch.zeros(5, dtype=torch.long), torch.zeros(0))
    assert torch.equal(sums, torch.zeros(4, 3))


def test_autocast_does_not_round_the_sums() -> None:
    bags = _bags(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sums = bag_sums(*bags)
    assert torch.equal(sums, bag_sums(*bags))


def test_tables_on_a_cpu_are_gathered_as_they_are() -> None:
    table = torch.zeros(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert gathered_dtype(table) == torch.float32


def test_factors_may_be_wider_than_the_table() -> None:
    index, table, offsets, factors = _bags(torch.bfloat16)
    assert torch.equal(
        bag_sums(index, table, offsets, factors.float()), bag_sums(index, table, offsets, factors)
    )
