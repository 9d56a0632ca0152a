"""The share of the data that each process reads, and the states of all in one checkpoint.

How documents are dealt out is said in `saelens_matryoshka.store.shares`. Here every process is one of N that
read, whatever the mesh: each gives its part of the rows of every batch. Of a cache, every process reads its
part of the same batches, whose place is one number for all.

What waits to be trained on is a process's own, and may be gigabytes. A checkpoint is sealed by the first
process, the only one that writes, perhaps to a disk that the others do not see. So it asks one after the
other for its state and passes it on to the disk in pieces: nowhere is more in memory than copies of a
process's own state. The price is time, because N buffers go through one process. Who has many processes can
lower `n_batches_in_buffer`: N buffers mix N times as many rows.
"""

from __future__ import annotations

from pathlib import Path

from datasets import IterableDataset

from saelens_matryoshka.cache.store import CachedActivationsStore
from saelens_matryoshka.parallel.processes import Processes
from saelens_matryoshka.seams import token_sequences
from saelens_matryoshka.store.resumable import ResumableStore
from saelens_matryoshka.store.state import state_file


def share_data(store: ResumableStore, rank: int, size: int) -> None:
    """Have a store that has not been read from give this process's part of every batch.

    Args:
        store: With the dataset and the batch size of all processes together.
        rank: Of this process.
        size: How many there are.

    Raises:
        ValueError: the batch or the dataset cannot be divided.
    """
    batch = store.train_batch_size_tokens
    require_divisible(batch, size)
    store.train_batch_size_tokens = batch // size
    whole = store.cached_activation_dataset or store.dataset
    if whole is not None and not isinstance(whole, IterableDataset) and len(whole) < size:
        raise ValueError(
            f"The dataset has {len(whole)} documents, fewer than there are processes ({size}): use more "
            "text, or fewer processes."
        )
    store.read_share(rank, size)
    if store.dataset is not None and next(token_sequences(store), None) is None:
        raise ValueError(
            f"The share of process {rank} of {size} has too little text for one sequence of "
            f"context_size={store.context_size} tokens: use more text, or fewer processes."
        )


def require_divisible(batch: int, size: int) -> None:
    """Refuse a batch that so many processes cannot divide.

    Raises:
        ValueError: it is none.
    """
    if batch % size:
        raise ValueError(
            f"train_batch_size_tokens={batch} is the batch of all processes together, and cannot be divided "
            f"among {size}. Take a multiple of {size}, e.g. {-(-batch // size) * size}."
        )


def save_all_states(store: ResumableStore, group: Processes) -> None:
    """Have the first process's store save the states of all, which have shares of the data.

    Args:
        store: Of this process.
        group: The processes, of which the others answer while the first saves.
    """
    if isinstance(store, CachedActivationsStore):  # the same place for all
        return
    group.give = lambda: store.state().to_bytes()
    save_own = store.save_to_checkpoint

    def save_to_checkpoint(checkpoint_path: str | Path) -> None:
        save_own(checkpoint_path)
        for rank in range(1, group.size):
            with state_file(Path(checkpoint_path), rank).open("wb") as file:
                group.ask(rank, file.write)

    store.save_to_checkpoint = save_to_checkpoint  # type: ignore[method-assign]
