"""The share of the data that each process reads.

Documents are dealt out one by one, after those held out for evaluation: of N processes, process r reads the
documents r, r + N, r + 2N, ... So what N processes have read is the beginning of the dataset, give or take
what waits in their buffers, and M others can go on behind it. The place in the data that a checkpoint has is
therefore one number, the documents read by all processes together.

A streaming dataset whose files can be divided evenly among the processes is divided by files, so that none
reads what it does not use; "the beginning" is then the beginning of every file in turn. A process that comes
to the end of its share starts it again, as a process alone does.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens import ActivationsStore
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import load_file, save_file

from saelens_matryoshka.seams import before_split_off, read_from

_COUNT = "n_dataset_processed"


def share_data(store: ActivationsStore, rank: int, size: int) -> None:
    """Have a store that has not been read from give this process's part of every batch.

    Args:
        store: With the dataset and the batch size of all processes together.
        rank: Of this process.
        size: How many processes there are.

    Raises:
        ValueError: the batch or the dataset cannot be divided.
    """
    batch = store.train_batch_size_tokens
    if batch % size:
        raise ValueError(
            f"train_batch_size_tokens={batch} is the batch of all processes together, and cannot be divided "
            f"among {size}. Take a multiple of {size}, e.g. {-(-batch // size) * size}."
        )
    store.train_batch_size_tokens = batch // size
    if store.cached_activation_dataset is not None:
        store.cached_activation_dataset = _share_of_rows(store.cached_activation_dataset, rank, size)
        return
    if isinstance(store.dataset, IterableDataset):
        share = _share_of_stream(store.dataset, *before_split_off(store), rank, size)
    else:
        share = _share_of_rows(store.dataset, rank, size)
    read_from(store, share)
    _count_for_all(store, rank, size)


def _share_of_rows(dataset: Any, rank: int, size: int) -> Any:
    if len(dataset) < size:
        raise ValueError(
            f"The dataset has {len(dataset)} documents, fewer than there are processes ({size}): use more "
            "text, or fewer processes."
        )
    return dataset.shard(size, rank, contiguous=False)


def _share_of_stream(
    dataset: IterableDataset, whole: IterableDataset, n_held_out: int, rank: int, size: int
) -> IterableDataset:
    if n_held_out == 0 or whole.n_shards % size:
        return split_dataset_by_node(dataset, rank, size)
    # Divided by files, the number of documents to skip would be divided too. Those held out are the first of
    # some files: no process has more than n of them, and they are the first of its share.
    return split_dataset_by_node(whole, rank, size).skip(n_held_out)


def _count_for_all(store: ActivationsStore, rank: int, size: int) -> None:
    """Save, and go to, a place in the data of all processes.

    SAELens counts a document when the next one is asked for: one more than it has counted has been begun.
    """

    def save_to_checkpoint(checkpoint_path: str | Path) -> None:
        n_begun = (store.state_dict()[_COUNT] + 1) * size
        save_file({_COUNT: n_begun - 1}, Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME)

    def load_from_checkpoint(checkpoint_path: str | Path) -> None:
        n_begun = int(load_file(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME)[_COUNT]) + 1
        own = torch.tensor(max(len(range(rank, n_begun, size)) - 1, 0))
        with TemporaryDirectory() as folder:
            path = Path(folder) / ACTIVATIONS_STORE_STATE_FILENAME
            save_file({_COUNT: own}, path)
            store.load(str(path))  # passes over so many documents

    store.save_to_checkpoint = save_to_checkpoint  # type: ignore[method-assign]
    store.load_from_checkpoint = load_from_checkpoint  # type: ignore[method-assign]
