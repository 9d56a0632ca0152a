"""Who shares a training step: one process, or many that each hold a block of it.

A step is about a matrix of activations, rows (tokens) by latents. Many processes cut it into blocks: each
holds some of the rows, or some of the latents. What the step must know of the other blocks are sums, minima
and the largest scores; `Group` is the answer of a process that is alone, for which its block is the whole.
`saelens_matryoshka.parallel` has the answer of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from saelens_matryoshka.ops.order import kth_largest

Over = Literal["rows", "latents", "all"]
"""Which blocks: those with other rows of the same latents, with other latents of the same rows, or all"""


class Group:
    """A process alone. Methods are called by all processes of a group, in the same order."""

    size: int = 1
    """how many blocks there are"""
    row_blocks: int = 1
    """into how many blocks the rows are cut, all of the same length"""

    def widths(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Of prefixes of the whole dictionary, how many latents of each this block has."""
        return tuple(widths)

    def sum(self, tensor: torch.Tensor, over: Over) -> torch.Tensor:  # noqa: ARG002
        """The elementwise sum over blocks, the same bits on all of them; may overwrite `tensor`."""
        return tensor

    def min(self, tensor: torch.Tensor, over: Over) -> torch.Tensor:  # noqa: ARG002
        """The elementwise minimum over blocks; may overwrite `tensor`."""
        return tensor

    def count(self, n: int, over: Over) -> int:  # noqa: ARG002
        """The sum of a number over blocks."""
        return n

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This block's of the items `[n, ...]` that all blocks divide among themselves: at most 1 fewer than
        another's."""
        return tensor

    def in_turn(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
        """The rows `[m, d]` that each block of latents has, one block after the other, and whether they are
        this one's: for all of them to apply their latents to."""
        yield rows, True

    def gather_latents(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[d_sae]` of all latents of the whole dictionary, of this block's `[m]`."""
        return values

    def kth_largest(self, values: torch.Tensor, n: int) -> torch.Tensor:
        """The n-th largest (from 1) of the values `[m]` of all blocks together; there are as many."""
        return kth_largest(values, n).squeeze()

    def largest(
        self,
        values: torch.Tensor,
        n: int,
        index: torch.Tensor,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
    ) -> torch.Tensor:
        """Which of this block's values are among the n largest of all, ties by lower index in the whole.

        Args:
            values: `[m]`; all blocks together have more than n.
            n: How many to keep of all blocks together.
            index: `[m]`, increasing: where each value is in this block, flat and row-major.
            shape: Rows and latents of this block.

        Returns:
            Mask `[m]`.
        """
        if n == 0:
            return torch.zeros_like(values, dtype=torch.bool)
        smallest_kept = self.kth_largest(values, n)
        above, tied = values > smallest_kept, values == smallest_kept
        return above | (tied & (tied.cumsum(0) <= n - above.sum()))

    def row_thresholds(self, values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The n-th largest value of each row, over all blocks of latents.

        Args:
            values: `[rows, m]`; all blocks together have n or more columns.
            n: How many of each row to keep.

        Returns:
            The thresholds `[rows, 1]`, and how many values of each row this block may keep `[rows]`: all that
            are larger and, by lower index, as many of those equal to the threshold as there is room for.
        """
        return kth_largest(values, n), torch.full((len(values),), n, device=values.device)


ALONE = Group()
