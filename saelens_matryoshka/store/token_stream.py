"""Sequences of tokens cut from a dataset, as SAELens's store cuts them, from any position in it.

A position is the number of documents begun in this epoch and the tokens of the last one that are not used
yet: at the end of a sequence, nothing else is pending. To find it again, a map-style dataset is indexed; a
streaming dataset is asked for its own state, which spares reading again what has been read. Either way the
last document that was begun is read again and compared, so that a dataset which has changed is noticed; a
streaming dataset that cannot come back to the same place (behind a shuffle buffer it cannot) is read from its
start.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from sae_lens.pretokenize_runner import get_special_token_from_cfg

from saelens_matryoshka.seams import OpenStore
from saelens_matryoshka.store.shares import Begun, Division, another_dataset, fingerprint

_IN_JSON = ("n_documents", "n_dataset_processed", "dataset_state", "dataset_state_at", "cached_row", "epoch")


@dataclass(frozen=True)
class Position:
    """A place between two sequences of a dataset."""

    n_documents: int = 0
    """documents begun in this epoch"""
    last_document: Any = None
    """the last of them, or its fingerprint"""
    rests: tuple[torch.Tensor, ...] = ()
    """tokens not used yet of documents begun: of the last one, and of those other processes have left"""
    epoch: int = 0
    """how often all documents have been read"""
    before: tuple[Division, ...] = ()
    """how far the processes came that were other ones in this epoch; they have had their documents already"""
    n_dataset_processed: int = 0
    """SAELens's count of documents, over all epochs"""
    dataset_state: dict[str, Any] | None = None
    """a streaming dataset's own state a little before this place"""
    dataset_state_at: int = 0
    """documents begun there"""
    cached_row: int = 0
    """row of activations cached on disk, which are read in place of documents"""

    @property
    def fingerprint(self) -> str | None:
        """Of the last document; None if none was begun."""
        return None if self.n_documents == 0 else fingerprint(self.last_document)

    def saved(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """All rests in one tensor, and everything else as JSON."""
        values = {name: getattr(self, name) for name in _IN_JSON}
        values |= {
            "last_document": self.fingerprint,
            "rests": [len(rest) for rest in self.rests],
            "before": self.before,
        }
        return torch.cat([torch.zeros(0, dtype=torch.long), *(rest.cpu() for rest in self.rests)]), values

    @classmethod
    def of_saved(cls, rests: torch.Tensor, values: dict[str, Any]) -> Position:
        """What `saved` gave."""
        lengths = values.get("rests", [len(rests)])
        before = tuple(
            tuple(None if begun is None else Begun(*begun) for begun in division)
            for division in values.get("before", [])
        )
        return cls(**{**values, "rests": rests.split(lengths), "before": before})


class TokenStream(Iterator[torch.Tensor]):
    """Sequences of `context_size` tokens, from a position to the end of the dataset."""

    def __init__(self, store: OpenStore, start: Position | None = None, dataset: Any = None) -> None:
        """The sequences of one epoch, or what is left of it.

        Args:
            store: Says how they are cut.
            start: Where to begin; None, at the beginning of the first epoch.
            dataset: To be read in place of the store's.
        """
        self._store, self._start = store, start or Position()
        self._documents = _Documents(store, self._start, store.dataset if dataset is None else dataset)
        self._rests = deque(self._start.rests)
        self._ended = False
        if store.is_dataset_tokenized or store.disable_concat_sequences:
            self._sequences = store.sequences_of(self._documents)
        else:
            self._sequences = self._concatenated()

    def __next__(self) -> torch.Tensor:
        try:
            return next(self._sequences)
        except StopIteration:
            self._ended = True
            raise

    @property
    def next_epoch(self) -> int:
        """The epoch of a stream that starts now: the one after, if this one has been read to its end."""
        return self._start.epoch + self._ended

    def position(self) -> Position:
        """Where the last sequence ended. What is read from now on does not change it."""
        documents = self._documents
        documents.remember_state = True
        return Position(
            n_documents=documents.n_begun,
            last_document=documents.last,
            rests=tuple(self._rests),
            epoch=self._start.epoch,
            before=self._start.before,
            n_dataset_processed=self._store.n_dataset_processed,
            dataset_state=documents.state,
            dataset_state_at=documents.state_at,
        )

    def _concatenated(self) -> Iterator[torch.Tensor]:
        """As SAELens's `concat_and_batch_sequences` cuts them."""
        store, size = self._store, self._store.context_size
        tokenizer = getattr(store.model, "tokenizer", None)
        bos = tokenizer.bos_token_id if tokenizer is not None and store.prepend_bos else None
        separator = None
        if tokenizer is not None:
            separator = get_special_token_from_cfg(store.sequence_separator_token, tokenizer)
        sequence = torch.empty(0, dtype=torch.long)
        for rest in self._unused(store.tokens_of(self._documents)):
            while len(rest):
                leading = separator if len(sequence) else bos
                prefix = rest.new_empty(0)
                if leading is not None and rest[0] != leading:
                    prefix = rest.new_tensor([leading])
                room = size - len(sequence)
                n_used = max(room - len(prefix), 0)
                sequence = torch.cat((sequence.to(rest.device), prefix[:room], rest[:n_used]))
                rest = self._rests[0] = rest[n_used:]
                if len(sequence) == size:
                    yield sequence
                    sequence = rest.new_empty(0)

    def _unused(self, documents: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The rests, each until it is used up, and then the tokens of one document after the other."""
        while True:
            while self._rests:
                yield self._rests[0]
                self._rests.popleft()
            try:
                self._rests.append(next(documents))
            except StopIteration:
                return


class _Documents:
    """The rows of a dataset from a position on, counted."""

    def __init__(self, store: OpenStore, start: Position, dataset: Any) -> None:
        self._store, self._start, self._dataset = store, start, dataset
        self.n_begun, self.last = start.n_documents, start.last_document
        self.state, self.state_at = start.dataset_state, start.dataset_state_at
        self.remember_state = True

    def __iter__(self) -> Iterator[Any]:
        dataset, rows = self._open()
        # SAELens counts a document when the next one is asked for.
        counted = self.n_begun == 0
        while True:
            if not counted:
                self._store.n_dataset_processed += 1
            if self.remember_state and isinstance(dataset, IterableDataset):
                self.state, self.state_at = _json_state(dataset), self.n_begun
                self.remember_state = False
            try:
                row = next(rows)
            except StopIteration:
                return
            self.n_begun, self.last, counted = self.n_begun + 1, row[self._store.tokens_column], False
            yield row

    def _open(self) -> tuple[Any, Iterator[Any]]:
        """The dataset to read from, and its rows after those that were begun."""
        dataset = self._dataset
        if isinstance(dataset, IterableDataset):
            dataset = dataset.skip(0)  # one of our own: a state that is loaded holds for all later epochs
        n = self._start.n_documents
        if n == 0:
            return dataset, iter(dataset)
        ways = [(dataset.skip(n - 1), 1)]
        if isinstance(dataset, IterableDataset) and self._start.dataset_state is not None:
            dataset.load_state_dict(self._start.dataset_state)
            ways.insert(0, (dataset, n - self._start.dataset_state_at))
        for way, n_again in ways:
            rows = iter(way)
            again = list(itertools.islice(rows, n_again))
            if len(again) == n_again and self._is_last(again[-1]):
                return way, rows
        raise another_dataset(n)

    def _is_last(self, row: Any) -> bool:
        return fingerprint(row[self._store.tokens_column]) == fingerprint(self._start.last_document)


def _json_state(dataset: IterableDataset) -> dict[str, Any] | None:
    """A streaming dataset's state, if JSON can hold it and the dataset can go on from it exactly."""
    if _has_shuffle_buffer(dataset):
        return None
    try:
        return json.loads(json.dumps(dataset.state_dict()))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return None


def _has_shuffle_buffer(dataset: IterableDataset) -> bool:
    # The contents of a shuffle buffer are not in the state, and nothing public tells of it.
    steps: list[Any] = [dataset._ex_iterable]
    while steps:
        step = steps.pop()
        if "BufferShuffled" in type(step).__name__:
            return True
        steps += getattr(step, "ex_iterables", [])
        steps += [step.ex_iterable] if hasattr(step, "ex_iterable") else []
    return False
