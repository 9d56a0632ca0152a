"""What the mixing buffer reads, holds and moves, counted without activations.

Batches of the language model are collected in a tensor that has room for all, shuffled into a new one, and
served in slices of that. What is kept back is moved to the next room before the next batches are read, so
that the memory of what was served is free. There are two buffers only while one is shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class BufferRows(NamedTuple):
    """Rows that there is memory for at a time, at their most."""

    filling: int
    """while the language model computes the next batch"""
    shuffling: int
    """while a full buffer is shuffled"""
    serving: int
    """during a training step"""
    read: int
    """computed by the language model until the rows wanted were served"""
    moved: int
    """copied until then"""
    first_read: int
    """computed before the first row is served"""
    first_moved: int
    """copied before the first row is served"""
    refills: int
    """times the buffer is shuffled until the rows wanted were served"""


def rows_per_prompt(context_size: int, seqpos_slice: Sequence[int | None]) -> int:
    """Tokens of a prompt that are trained on."""
    return len(range(*slice(*seqpos_slice).indices(context_size)))


def buffer_rows(*, buffer_size: int, llm_batch: int, train_batch: int, mix: float, wanted: int) -> BufferRows:
    """Follow `saelens_matryoshka.store.mixing` until `wanted` rows were served, or its rhythm is known.

    Args:
        buffer_size: Rows from which it is shuffled and served.
        llm_batch: Rows of one batch of the language model.
        train_batch: Rows of one training step.
        mix: Share of buffer_size that is kept back at each shuffle.
        wanted: Rows to be served in all.
    """
    filling = shuffling = serving = served = refills = 0
    read = moved = first_read = first_moved = 0
    stored = 0  # rows that wait
    while served < wanted and refills < 4:
        # a batch that is a buffer of its own stays where it is
        room = buffer_size + llm_batch if stored or llm_batch < buffer_size else 0
        shuffling = max(shuffling, serving + room)
        n_new = max(1, -(-(buffer_size - stored) // llm_batch))
        stored, read = stored + n_new * llm_batch, read + n_new * llm_batch
        filling = max(filling, room)
        refills += 1
        moved += stored * ((room > 0) + (mix > 0))
        first_read, first_moved = first_read or read, first_moved or moved
        shuffling = max(shuffling, (room + llm_batch) + (mix > 0) * stored)
        serving = max(serving, stored if mix > 0 else room or llm_batch)
        n_batches = max(1, (stored - int(buffer_size * mix)) // train_batch)
        served += min(n_batches * train_batch, stored)
        stored = max(0, stored - n_batches * train_batch)
    if served < wanted:
        steady = (wanted - served) / served
        moved += round(steady * moved)
        refills += round(steady * refills)
        read += wanted - served
    return BufferRows(filling, shuffling, serving, read, moved, first_read, first_moved, refills)
