"""What the mixing buffer reads, holds and moves, counted without activations.

Batches of the language model are collected, shuffled into a new tensor, and served in slices of it. What is
kept back is copied out of that tensor before the next batches are read, so that its memory is free. There are
two buffers only while one is shuffled.
"""

from __future__ import annotations

from typing import NamedTuple


class BufferRows(NamedTuple):
    """Rows of activations that exist at a time, at their most."""

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
    refills: int
    """times the buffer is shuffled until the rows wanted were served"""


def buffer_rows(*, buffer_size: int, llm_batch: int, train_batch: int, mix: float, wanted: int) -> BufferRows:
    """Follow `saelens_matryoshka.mixing` until `wanted` rows were served, or its rhythm is known.

    Args:
        buffer_size: Rows from which it is shuffled and served.
        llm_batch: Rows of one batch of the language model.
        train_batch: Rows of one training step.
        mix: Share of buffer_size that is kept back at each shuffle.
        wanted: Rows to be served in all.
    """
    filling = shuffling = serving = served = refills = 0
    read = moved = first_read = 0
    stored = 0  # rows that wait
    while served < wanted and refills < 4:
        if served:
            moved += stored
        n_parts = int(stored > 0)
        while True:
            filling = max(filling, stored)
            stored, read, n_parts = stored + llm_batch, read + llm_batch, n_parts + 1
            if stored >= buffer_size:
                break
        refills += 1
        first_read = first_read or read
        is_copied = mix > 0 or n_parts > 1
        shuffling = max(shuffling, (1 + is_copied) * stored)
        moved += is_copied * stored
        serving = max(serving, stored)
        n_batches = max(1, (stored - int(buffer_size * mix)) // train_batch)
        served += min(n_batches * train_batch, stored)
        kept = max(0, stored - n_batches * train_batch)
        shuffling = max(shuffling, stored + kept)
        stored = kept
    if served < wanted:
        steady = (wanted - served) / served
        moved += round(steady * moved)
        refills += round(steady * refills)
        read += wanted - served
    return BufferRows(filling, shuffling, serving, read, moved, first_read, refills)
