"""Read a cache: batches of shuffled rows, as fast as the disk gives them.

The files are mapped into memory. A batch is made of blocks of consecutive rows taken from all over the cache
(one permutation of the blocks per epoch), interleaved; within a file the rows were shuffled when they were
written. So there is no buffer to fill, and where a run stands is one number: how many batches it has had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file

from saelens_matryoshka.cache.encoding import Rows, decode, from_arrow
from saelens_matryoshka.cache.manifest import GAINS, CacheError, Manifest, Split, damage
from saelens_matryoshka.sites import Site

# Rows read in one piece. Of 2304 bfloat16 values they are 0.6 MB.
_BLOCK_ROWS = 128


@dataclass(frozen=True)
class ActivationCache:
    """An open cache."""

    folder: Path
    manifest: Manifest
    gains: Mapping[str, torch.Tensor]
    tables: Mapping[str, Any]

    def rows(self, split: Split, hook: str) -> list[Rows]:
        """The encoded rows of a hook, file by file, as views of the files."""
        return [from_arrow(table, hook) for table in self.tables.get(split, [])]

    def site(self, hook: str, *, with_gain: bool) -> Site:
        """A hook, with its norm's gain if asked for.

        Raises:
            CacheError: the hook has no gain.
        """
        if not with_gain:
            return Site(hook)
        if (gain := self.gains.get(f"{hook}.gain")) is None:
            raise CacheError(
                f"input_gain='norm_weight' needs the hook_normalized of a norm with its weight, and {hook!r} "
                f"of the cache {self.folder} is {self.manifest.hooks[hook].frame!r}. Set input_gain='none'."
            )
        return Site(hook, gain, self.gains.get(f"{hook}.offset"))

    def batches(
        self, hooks: Sequence[str], batch_size: int, *, seed: int, device: Any = "cpu", dtype: torch.dtype
    ) -> CachedBatches:
        """An endless stream of shuffled batches for training."""
        return CachedBatches(self, hooks, batch_size, seed, torch.device(device), dtype)

    def held_out(
        self, hooks: Sequence[str], batch_size: int, *, device: Any = "cpu", dtype: torch.dtype
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The rows set aside for evaluation, once."""
        by_hook = {hook: self.rows("held_out", hook) for hook in hooks}
        for shard in range(len(self.tables.get("held_out", []))):
            n = len(by_hook[hooks[0]][shard].values)
            for start in range(0, n, batch_size):
                span = slice(start, start + batch_size)
                yield {
                    hook: _decoded(_part(rows[shard], span), device, dtype) for hook, rows in by_hook.items()
                }


class CachedBatches(Iterator[dict[str, torch.Tensor]]):
    """`{hook: [batch_size, d]}`, endless, every row once per epoch (but for a rest of each file).

    The stream is a function of the cache, `batch_size` and `seed`: `position` is all of its state.
    """

    def __init__(
        self,
        cache: ActivationCache,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.hooks, self.seed, self.device, self.dtype = list(hooks), seed, device, dtype
        self.position = 0
        """batches read"""
        self._batch_size, self._own = batch_size, slice(0, batch_size)
        self._rows = {hook: cache.rows("train", hook) for hook in self.hooks}
        self._block = next(n for n in range(min(_BLOCK_ROWS, batch_size), 0, -1) if batch_size % n == 0)
        self._per_batch = batch_size // self._block
        shards = self._rows[self.hooks[0]]
        self._blocks = torch.tensor(
            [(s, i) for s, rows in enumerate(shards) for i in range(len(rows.values) // self._block)],
            dtype=torch.long,
        ).view(-1, 2)
        self.batches_per_epoch = len(self._blocks) // self._per_batch
        if self.batches_per_epoch == 0:
            raise CacheError(
                f"The cache {cache.folder} has {cache.manifest.rows('train'):,} tokens to train on, too few "
                f"for a batch of train_batch_size_tokens={batch_size}. Write more, or lower it."
            )
        self._epoch, self._order = -1, torch.empty(0)

    def read_share(self, rank: int, size: int) -> None:
        """From now on read one of `size` equal parts of every batch, which together are the batch."""
        n = self._batch_size // size
        self._own = slice(rank * n, (rank + 1) * n)

    def __next__(self) -> dict[str, torch.Tensor]:
        epoch, index = divmod(self.position, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._blocks), generator=generator)
        chosen = self._order[index * self._per_batch : (index + 1) * self._per_batch]
        blocks = self._blocks[chosen].tolist()
        self.position += 1
        return {hook: self._gather(rows, blocks) for hook, rows in self._rows.items()}

    def _gather(self, shards: list[Rows], blocks: list[list[int]]) -> torch.Tensor:
        # interleaved: the first rows of a batch, too, are from all over the cache
        n, own = self._per_batch, self._own
        first, last = own.start // n, -(-own.stop // n)  # rows of every block
        own = slice(own.start - first * n, own.stop - first * n)
        parts = [_part(shards[s], slice(i * self._block + first, i * self._block + last)) for s, i in blocks]
        values = torch.stack([part.values for part in parts], dim=1).flatten(0, 1)[own]
        scales = [part.scale for part in parts if part.scale is not None]
        scale = torch.stack(scales, dim=1).flatten()[own] if scales else None
        return _decoded(Rows(values, scale), self.device, self.dtype)


def open_cache(folder: Path | str) -> ActivationCache:
    """Open a cache, after a look at the size and at samples of every file.

    Raises:
        CacheError: there is none, it is not complete, or a file is missing or damaged.
    """
    folder = _path(folder)
    manifest = Manifest.load(folder)
    if not manifest.complete:
        raise CacheError(
            f"The cache {folder} is not complete: it has {manifest.rows('train'):,} tokens of "
            f"{manifest.settings['training_tokens']:,}. Run the command that was writing it again."
        )
    _require_intact(folder, manifest, fully=False)
    tables: dict[str, Any] = {}
    for split in ("train", "held_out"):
        tables[split] = [
            datasets.Dataset.from_file(str(folder / name)).data.table for name in manifest.shards(split)
        ]
    return ActivationCache(folder, manifest, load_file(folder / GAINS), tables)


def verify_cache(folder: Path | str) -> Manifest:
    """Read every byte of a cache and compare the checksums.

    Raises:
        CacheError: a file is missing or damaged.
    """
    folder = _path(folder)
    manifest = Manifest.load(folder)
    _require_intact(folder, manifest, fully=True)
    return manifest


def _path(folder: object) -> Path:
    if not isinstance(folder, str | PathLike):
        raise CacheError(f"folder={folder!r} must be the path of an activation cache.")
    return Path(folder)


def _require_intact(folder: Path, manifest: Manifest, *, fully: bool) -> None:
    files = {**manifest.train, **manifest.held_out, **manifest.others}
    found = [what for name, shard in files.items() if (what := damage(folder, name, shard, fully=fully))]
    if found:
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise CacheError(
            f"{found[0]}{more}. "
            + (
                "Delete it and run the command that wrote the cache again: it makes what is missing."
                if fully
                else "Run the command that wrote the cache again: it makes what is missing or damaged."
            )
        )


def _part(rows: Rows, span: slice) -> Rows:
    return Rows(rows.values[span], None if rows.scale is None else rows.scale[span])


def _decoded(rows: Rows, device: Any, dtype: torch.dtype) -> torch.Tensor:
    moved = Rows(rows.values.to(device), None if rows.scale is None else rows.scale.to(device))
    decoded = decode(moved, dtype)
    return decoded.clone() if decoded.data_ptr() == rows.values.data_ptr() else decoded
