"""A dataset dealt out to processes; and what some have left of it, to others.

Documents are dealt out one by one: of N processes, process r reads the documents r, r + N, r + 2N, ... A
streaming dataset whose files can be divided evenly is divided by files, so that none reads what it does not
use. A process that comes to the end of its share begins it again.

When N processes stop and M others go on, the documents of this epoch that are not begun are what is left of
N shares. With g the greatest common divisor of N and M, each share goes to one of g groups, M/g processes
take turns at the documents of N/g shares, one share after the other, and nobody reads what goes to another
group. That is a dataset too, of which others may leave something again. The next epoch is divided as if M
processes had always been there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset, concatenate_datasets


class Begun(NamedTuple):
    """How far a process has come in its share of an epoch."""

    n_documents: int
    last: str | None
    """the fingerprint of the last of them"""


Division = tuple[Begun | None, ...]
"""How far each of some processes has come in an epoch; None has come to the end of its share."""


@dataclass(frozen=True)
class Shares:
    """How a dataset, map-style or streaming, is dealt out."""

    dataset: Any
    """without what is held out"""
    column: str
    """that holds a document"""
    with_held_out: Any = None
    """the same dataset before its first documents were held out"""
    n_held_out: int = 0

    def share(self, rank: int, size: int, before: Sequence[Division] = ()) -> Any:
        """What a process reads in an epoch.

        Args:
            rank: Of the process.
            size: How many there are.
            before: Those who were other ones in this epoch, the first ones first.
        """
        if not before:
            return self._share(rank, size)
        *earlier, division = before
        n, n_groups = len(division), math.gcd(size, len(division))
        left = [
            self._behind(self.share(other, n, earlier), begun)
            for other, begun in enumerate(division)
            if begun is not None and other % n_groups == rank % n_groups
        ]
        left = concatenate_datasets(left or [self.dataset.take(0)])
        return _one_by_one(left, rank // n_groups, size // n_groups)

    def _share(self, rank: int, size: int) -> Any:
        whole = self.with_held_out
        if size == 1 or not isinstance(whole, IterableDataset) or whole.n_shards % size:
            return _one_by_one(self.dataset, rank, size)
        share = whole.shard(size, rank, contiguous=False)
        # Those held out are the first of some files: no share has more than n of them, at its beginning.
        return share.skip(self.n_held_out) if self.n_held_out else share

    def _behind(self, share: Any, begun: Begun) -> Any:
        """A share without the documents begun, the last of which is compared."""
        n = begun.n_documents
        if n == 0:
            return share

        def is_left(row: Any, index: int) -> bool:
            if index == 0 and fingerprint(row[self.column]) != begun.last:
                raise another_dataset(n)
            return index > 0

        if isinstance(share, IterableDataset):
            return share.skip(n - 1).filter(is_left, with_indices=True)
        if len(share) < n:
            raise another_dataset(n)
        is_left(share[n - 1], 0)
        return share.skip(n) if n < len(share) else share.take(0)


def _one_by_one(dataset: Any, rank: int, size: int) -> Any:
    if size == 1:
        return dataset
    if isinstance(dataset, IterableDataset):
        # datasets' own split_dataset_by_node counts what is skipped later before it splits
        return dataset.filter(lambda _, index: index % size == rank, with_indices=True)
    return dataset.shard(size, rank, contiguous=False)


def fingerprint(document: Any) -> str:
    """SHA-256 of a document's text, messages or tokens."""
    if isinstance(document, str) and document.startswith("sha256:"):
        return document
    if isinstance(document, torch.Tensor):
        document = document.tolist()
    return "sha256:" + hashlib.sha256(json.dumps(document, default=str).encode()).hexdigest()


def another_dataset(n: int) -> ValueError:
    """The error that the n-th document is not the one that was read."""
    return ValueError(
        f"The dataset is not the one this run was started with: its document {n} is another than the one "
        "read before the checkpoint. Give the same dataset, in the same version and order."
    )
