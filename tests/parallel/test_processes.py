"""What processes choose together is what one would choose that had everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_matryoshka.ops import ALONE
from saelens_matryoshka.ops.selection import largest_of_rows
from saelens_matryoshka.parallel import processes
from saelens_matryoshka.parallel.processes import _kth_largest
from tests.parallel.processes import group_of, run_in_processes


@pytest.mark.parametrize("dtype", [torch.float32, torch.double, torch.bfloat16, torch.int64])
def test_radix_search_finds_the_nth_largest(dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        values = (torch.randn(500) * 10**seed).to(dtype)
        for n in (1, 2, 17, 250, 499, 500):
            found = _kth_largest(values, n, ALONE)
            assert found.dtype == dtype
            assert found == values.topk(n).values.min()


def matrices() -> list[torch.Tensor]:
    """Random ones, and ones full of ties."""
    torch.manual_seed(0)
    random = [torch.randn(8, 11) for _ in range(3)]
    return random + [matrix.mul(2).round() for matrix in random] + [torch.zeros(8, 11)]


def chosen(n_rows: int, n_latents: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks of the 20 largest, and of the 3 largest of each row, of this process's block."""
    group = group_of(n_rows, n_latents, 11)
    block = 8 // n_rows
    found = []
    for matrix in matrices():
        own = matrix[group.row_block * block : (group.row_block + 1) * block, group.latents()]
        index = torch.arange(own.numel())
        largest = group.largest(own.flatten(), 20, index, tuple(own.shape))
        found.append((largest.view_as(own), largest_of_rows(own, 3, group)))
    return found


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (1, 3), (2, 2)], ids=str)
def test_the_largest_are_those_of_the_whole_ties_by_lower_index(
    mesh: tuple[int, int], tmp_path: Path
) -> None:
    n_rows, n_latents = mesh
    results = run_in_processes(n_rows * n_latents, tmp_path, chosen, *mesh)
    for case, matrix in enumerate(matrices()):
        expected = ALONE.largest(matrix.flatten(), 20, torch.arange(88), (8, 11)).view_as(matrix)
        by_row = largest_of_rows(matrix, 3)
        for rank, found in enumerate(results):
            rows = slice(rank // n_latents * (8 // n_rows), (rank // n_latents + 1) * (8 // n_rows))
            columns = slice(rank % n_latents, 11, n_latents)
            assert torch.equal(found[case][0], expected[rows, columns])
            assert torch.equal(found[case][1], by_row[rows, columns])


def asked_for(n: int) -> list[Any]:
    group = group_of(n, 1, 11)
    group.give = lambda: bytes([group.rank]) * 10
    if group.rank > 0:
        group.answer()
        return [group.count(1, "all")]

    def fail(piece: memoryview) -> None:
        raise OSError(f"no space left for {len(piece)} bytes")

    given, found = bytearray(), []
    group.ask(1, given.extend)
    try:
        group.ask(2, fail)
    except OSError as error:
        found.append(str(error))
    group.ask_no_more()  # the last one was not asked
    return [bytes(given), *found, group.count(1, "all")]


def test_the_first_process_asks_some_of_the_others_who_go_on_whatever_becomes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_PIECE", 4)
    found = run_in_processes(4, tmp_path, asked_for, 4)[0]
    assert found == [b"\x01" * 10, "no space left for 4 bytes", 4]
