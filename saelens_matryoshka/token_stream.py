"""Sequences of tokens cut from a dataset, as SAELens's store cuts them, from any position in it.

A position is the number of documents begun in this epoch and the tokens of the last one that are not used
yet: at the end of a sequence, nothing else is pending. To find it again, a map-style dataset is indexed; a
streaming dataset is asked for its own state, which spares reading again what has been read. Either way the
last document that was begun is read again and compared, so that a dataset which has changed is noticed; a
streaming dataset that cannot come back to the same place (behind a shuffle buffer it cannot) is read from its
start.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import IterableDataset
from sae_lens.pretokenize_runner import get_special_token_from_cfg

from saelens_matryoshka.seams import OpenStore


@dataclass(frozen=True)
class Position:
    """A place between two sequences of a dataset."""

    n_documents: int = 0
    """documents begun in this epoch"""
    last_document: Any = None
    """the last of them, or its fingerprint"""
    rest: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """tokens of the last of them that are not used yet"""
    n_dataset_processed: int = 0
    """SAELens's count of documents, over all epochs"""
    dataset_state: dict[str, Any] | None = None
    """a streaming dataset's own state a little before this place"""
    dataset_state_at: int = 0
    """documents begun there"""
    cached_row: int = 0
    """row of activations cached on disk, which are read in place of documents"""

    def as_json(self) -> dict[str, Any]:
        """Everything but `rest`."""
        return {
            "n_documents": self.n_documents,
            "last_document": None if self.n_documents == 0 else fingerprint(self.last_document),
            "n_dataset_processed": self.n_dataset_processed,
            "dataset_state": self.dataset_state,
            "dataset_state_at": self.dataset_state_at,
            "cached_row": self.cached_row,
        }


def fingerprint(document: Any) -> str:
    """SHA-256 of a document's text, messages or tokens."""
    if isinstance(document, str) and document.startswith("sha256:"):
        return document
    if isinstance(document, torch.Tensor):
        document = document.tolist()
    return "sha256:" + hashlib.sha256(json.dumps(document, default=str).encode()).hexdigest()


class TokenStream(Iterator[torch.Tensor]):
    """Sequences of `context_size` tokens, from a position to the end of the dataset."""

    def __init__(self, store: OpenStore, start: Position | None = None) -> None:
        self._store = store
        self._documents = _Documents(store, start or Position())
        self._rest = start.rest if start else Position().rest
        if store.is_dataset_tokenized or store.disable_concat_sequences:
            self._sequences = store.sequences_of(self._documents)
        else:
            self._sequences = self._concatenated()

    def __next__(self) -> torch.Tensor:
        return next(self._sequences)

    def position(self) -> Position:
        """Where the last sequence ended. What is read from now on does not change it."""
        documents = self._documents
        documents.remember_state = True
        return Position(
            n_documents=documents.n_begun,
            last_document=documents.last,
            rest=self._rest,
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
        sequence = self._rest.new_empty(0)
        for tokens in itertools.chain([self._rest], store.tokens_of(self._documents)):
            self._rest = tokens
            while len(self._rest):
                leading = separator if len(sequence) else bos
                prefix = self._rest.new_empty(0)
                if leading is not None and self._rest[0] != leading:
                    prefix = self._rest.new_tensor([leading])
                room = size - len(sequence)
                n_used = max(room - len(prefix), 0)
                parts = (sequence.to(self._rest.device), prefix[:room], self._rest[:n_used])
                sequence, self._rest = torch.cat(parts), self._rest[n_used:]
                if len(sequence) == size:
                    yield sequence
                    sequence = self._rest.new_empty(0)


class _Documents:
    """The rows of a dataset from a position on, counted."""

    def __init__(self, store: OpenStore, start: Position) -> None:
        self._store, self._start = store, start
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
        dataset: Any = self._store.dataset
        n = self._start.n_documents
        if n == 0:
            return dataset, iter(dataset)
        ways = []
        if isinstance(dataset, IterableDataset) and self._start.dataset_state is not None:
            # A copy, all of it, because a dataset starts every later epoch from a state loaded into it.
            resumed = copy.deepcopy(dataset)
            resumed.load_state_dict(self._start.dataset_state)
            ways.append((resumed, n - self._start.dataset_state_at))
        ways.append((dataset.skip(n - 1), 1))
        for way, n_again in ways:
            rows = iter(way)
            again = list(itertools.islice(rows, n_again))
            if len(again) == n_again and self._is_last(again[-1]):
                return way, rows
        raise ValueError(
            f"The dataset is not the one this run was started with: its document {n} is another than the one "
            "read before the checkpoint. Give the same dataset, in the same version and order."
        )

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
    step: Any = dataset._ex_iterable
    while step is not None:
        if "BufferShuffled" in type(step).__name__:
            return True
        step = getattr(step, "ex_iterable", None)
    return False
