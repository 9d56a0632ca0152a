"""What SAELens's mixing buffer holds and moves, counted without activations.

The buffer is filled by concatenating one batch of the language model after the other, shuffled into a
new tensor, and served in slices of it. So a slice that is still held by someone keeps the whole tensor
alive, and a refill holds the old tensor, the growing new one and its shuffled copy at a time.
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


def buffer_rows(
    *, buffer_size: int, llm_batch: int, train_batch: int, mix: float, wanted: int, batch_is_view: bool
) -> BufferRows:
    """Follow `sae_lens.training.mixing_buffer` until `wanted` rows were served, or its rhythm is known.

    Args:
        buffer_size: Rows from which it is shuffled and served.
        llm_batch: Rows of one batch of the language model.
        train_batch: Rows of one training step.
        mix: Share of buffer_size that is kept back at each shuffle.
        wanted: Rows to be served in all.
        batch_is_view: The last step's batch is still referred to in the next step, as a slice of its buffer.
    """
    filling = shuffling = serving = moved = served = refills = n_batches = 0
    stored = own = base = 0  # rows waiting; of a tensor of their own; of the tensor that was last served
    while served < wanted and (refills < 4 or served == 0):
        waiting = llm_batch if n_batches else 0  # the batch before is referred to until the next is there
        filling = max(filling, base + own + waiting)
        n_batches += 1
        if stored:
            moved += stored + llm_batch
            shuffling = max(shuffling, base + own + 2 * llm_batch + stored)
            stored, own = stored + llm_batch, stored + llm_batch
        else:
            stored, own = llm_batch, 0  # it is the batch itself
        if stored < buffer_size:
            continue
        refills += 1
        extra = llm_batch if own else 0
        if mix > 0:
            moved += stored
            shuffling = max(shuffling, base + max(own, llm_batch) + stored + extra)
            extra = llm_batch
        old, base = base, stored
        n_served = max(1, (stored - int(buffer_size * mix)) // train_batch) * train_batch
        serving = max(serving, base + extra + (old if batch_is_view else 0))
        served += min(n_served, stored)
        stored, own = max(stored - n_served, 0), 0
    return BufferRows(
        filling, shuffling, serving, moved / max(served, 1), _total_refills(served, refills, wanted)
    )


def _total_refills(served: int, refills: int, wanted: int) -> int:
    return refills if served >= wanted else round(refills * wanted / served)
