"""The mixing buffer as an object, so that what is in it can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

P = TypeVar("P")


def require_buffer(buffer_size: int, batch_size: int, mix_fraction: float) -> None:
    """Refuse a buffer that could not serve a batch.

    Raises:
        ValueError: it is smaller than a batch, or would keep less than nothing or more than all.
    """
    if buffer_size < batch_size:
        raise ValueError(
            f"The mixing buffer of {buffer_size} rows (n_batches_in_buffer × context_size) must hold a "
            f"batch of train_batch_size_tokens={batch_size}: raise n_batches_in_buffer."
        )
    if not 0 <= mix_fraction <= 1:
        raise ValueError(f"activations_mixing_fraction={mix_fraction} must be from 0 to 1.")


class MixingBuffer(Iterator[torch.Tensor], Generic[P]):
    """Batches of rows in random order; the same stream, bit for bit, as SAELens's `mixing_buffer`.

    Rows are collected until there are `buffer_size`. Then they are shuffled, a part is kept to be mixed with
    the next ones, and the rest is served. SAELens's grows one tensor by each batch of the language model,
    which copies it every time. This one has room for all from the start: kept apart, the batches would lie
    scattered among what the language model frees, which could then not be used for anything larger.

    An error in the source leaves the buffer as it was: rows and position still belong together.
    """

    serving: torch.Tensor | None
    """`[n, d]`, shuffled and still to be served: whole batches"""
    position: P
    """where the source stood after the rows that are in the buffer"""

    def __init__(
        self,
        source: Iterator[tuple[torch.Tensor, P]],
        *,
        buffer_size: int,
        batch_size: int,
        mix_fraction: float,
        start: P,
    ) -> None:
        """A buffer that is filled from a source.

        Args:
            source: Rows `[n, d]`, and the source's position after them.
            buffer_size: Rows that are collected before they are shuffled.
            batch_size: Rows of a batch.
            mix_fraction: Part of `buffer_size` that is kept; 0 for no shuffling.
            start: The source's position now.
        """
        require_buffer(buffer_size, batch_size, mix_fraction)
        self._source = source
        self._buffer_size, self._batch_size, self._mix_fraction = buffer_size, batch_size, mix_fraction
        self._room: torch.Tensor | None = None
        self._n_rows = self._longest = 0  # of what waits, and of what the source has given at once
        self.serving = None
        self.position = start

    @property
    def rows(self) -> torch.Tensor | None:
        """`[n, d]`, what waits to be shuffled."""
        return None if self._room is None else self._room[: self._n_rows]

    @rows.setter
    def rows(self, rows: torch.Tensor | None) -> None:
        self._room, self._n_rows = rows, 0 if rows is None else len(rows)

    def take_over(self, rows: torch.Tensor) -> None:
        """Begin with rows `[n, d]` that other buffers had; those that are more than is kept are served first.

        They may be on another device, where those to be served stay.
        """
        if self._mix_fraction > 0:
            rows = rows[torch.randperm(len(rows))]
        to_serve = max(len(rows) - int(self._buffer_size * self._mix_fraction), 0)
        self._serve(rows, to_serve // self._batch_size)

    @torch.no_grad()
    def __next__(self) -> torch.Tensor:
        """`[batch_size, d]`."""
        while self.serving is None or len(self.serving) < self._batch_size:
            self._refill()
        batch, self.serving = self.serving[: self._batch_size], self.serving[self._batch_size :]
        return batch.clone()  # who still refers to a slice keeps the whole buffer in memory

    def _refill(self) -> None:
        if self.serving is not None:  # what was kept is a slice of it: let the memory of the rest go
            kept, self.serving, self.rows = self.rows, None, None
            if kept is not None and len(kept):
                self._collect(kept)
            del kept
        try:
            new, position = next(self._source)
        except StopIteration:
            if self.rows is None or len(self.rows) < self._batch_size:
                raise
            self._serve(self.rows, len(self.rows) // self._batch_size)
            return
        self.position, self._longest = position, max(self._longest, len(new))
        if not self._n_rows and len(new) >= self._buffer_size:
            self.rows = new
        else:
            self._collect(new)
        if self._n_rows < self._buffer_size:
            return
        rows = self.rows
        assert rows is not None
        to_serve = self._n_rows - int(self._buffer_size * self._mix_fraction)
        if self._mix_fraction > 0:
            rows = rows.index_select(0, torch.randperm(self._n_rows).to(rows.device))
        self._serve(rows, max(1, to_serve // self._batch_size))

    def _collect(self, new: torch.Tensor) -> None:
        rows, n_rows = self.rows, self._n_rows + len(new)
        if self._room is None or n_rows > len(self._room):
            room = max(self._buffer_size + self._longest, n_rows)
            self._room = new.new_empty(room, *new.shape[1:])
            if rows is not None:
                self._room[: len(rows)] = rows
        self._room[self._n_rows : n_rows] = new
        self._n_rows = n_rows

    def _serve(self, rows: torch.Tensor, n_batches: int) -> None:
        n = n_batches * self._batch_size
        self.serving, self.rows = rows[:n], rows[n:]
