"""What the mixing buffer holds and moves, counted without activations.

The buffer is filled by concatenating one batch of the language model after the other, shuffled into a new
tensor, and served in slices of it. So there are two of them at a time whenever it is refilled.
"""

from __future__ import annotations

from typing import NamedTuple


class BufferRows(NamedTuple):
    """Rows of activations that exist at a time, at their most."""

    filling: int
    """while the language model computes the next batch"""
    shuffling: int
    """while a full buffer is shuffled, or grown by the last batch"""
    serving: int
    """during a training step"""
    moved: float
    """rows copied per row served"""
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
    filling = shuffling = serving = moved = served = refills = 0
    stored = held = 0  # rows that wait, and those of the tensor they are a slice of
    while served < wanted and refills < 4:
        filling = max(filling, held)
        if held:
            stored += llm_batch
            shuffling = max(shuffling, held + llm_batch + stored)
            moved += stored
        else:
            stored = llm_batch
        held = stored
        if stored < buffer_size:
            continue
        refills += 1
        if mix > 0:
            new = llm_batch if stored > llm_batch else 0  # else it is the tensor itself
            shuffling = max(shuffling, 2 * stored + new)
            moved += stored
        serving = max(serving, held)
        n_batches = max(1, (stored - int(buffer_size * mix)) // train_batch)
        served += min(n_batches * train_batch, stored)
        stored = max(0, stored - n_batches * train_batch)
    if served < wanted:
        refills = round(refills * wanted / served)
    return BufferRows(filling, shuffling, serving, moved / max(served, 1), refills)
