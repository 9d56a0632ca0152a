"""The activations of several dictionaries, from one store.

`ManyHookStore` streams rows in which all hooks lie side by side: one pass of the language model, up to the
deepest hook, one buffer, one shuffle; a hook that several dictionaries read is there once. What each of them
reads is a `Reading` of these rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import HfDataset
from sae_lens.training.prefetch import PrefetchingIterator
from typing_extensions import override

from saelens_matryoshka.store.pairs import multi_hook_store
from saelens_matryoshka.store.reading import Reading
from saelens_matryoshka.store.resumable import PrefetchedBatches, ResumableStore

_HOOKS = "hooks.json"


class ManyHookStore(ResumableStore):
    """Streams `[train_batch_size_tokens, sum of the hooks' widths]`. Built with `many_hook_store`."""

    widths: dict[str, int]
    """of each hook, in the order in which they lie in a row"""

    @override
    @torch.no_grad()
    def get_activations(self, batch_tokens: torch.Tensor) -> torch.Tensor:
        """Rows of a batch of tokens.

        Args:
            batch_tokens: `[prompts, context_size]`.

        Returns:
            `[prompts, context_size after seqpos_slice, sum of widths]` on the store's device.
        """
        activations = self.get_multi_hook_activations(batch_tokens)
        first = activations[next(iter(self.widths))]
        rows = torch.empty(*first.shape[:2], self.d_in, device=self.device, dtype=self.dtype)
        for hook, part in _split(rows, self.widths).items():
            part.copy_(activations[hook])
        return rows

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The hooks of rows `[n, sum of widths]`, as views."""
        return _split(rows, self.widths)

    @override
    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        (Path(checkpoint_path) / _HOOKS).write_text(json.dumps(self.widths))
        super().save_to_checkpoint(checkpoint_path)

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go back to a checkpoint of the same hooks, or of more, in any order.

        Raises:
            ValueError: a hook is not in it.
        """
        saved: dict[str, int] = json.loads((Path(checkpoint_path) / _HOOKS).read_text())
        if missing := [hook for hook in self.widths if hook not in saved]:
            raise ValueError(f"The checkpoint {checkpoint_path} is of a run without the hook {missing[0]!r}.")
        with self._lock:  # no batch is made of rows that still have other hooks
            super().load_from_checkpoint(checkpoint_path)
            if list(saved) == list(self.widths) or self._buffer is None:
                return
            for name in ("rows", "serving"):
                if (rows := getattr(self._buffer, name)) is not None:
                    parts = _split(rows, saved)
                    setattr(self._buffer, name, torch.cat([parts[hook] for hook in self.widths], dim=-1))


def _split(rows: torch.Tensor, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The hooks of rows `[..., sum of widths]`, as views."""
    return dict(zip(widths, rows.split(list(widths.values()), dim=-1), strict=True))


def many_hook_store(
    model: Any,
    cfg: LanguageModelSAERunnerConfig[Any],
    widths: dict[str, int],
    override_dataset: HfDataset | None = None,
) -> ManyHookStore:
    """The store of several dictionaries.

    Args:
        model: The language model.
        cfg: The runner config of one of them: text and buffer are the same for all.
        widths: Of every hook, heads flattened.
        override_dataset: Used in place of `cfg.dataset_path`.
    """
    store = multi_hook_store(ManyHookStore, model, cfg, widths, override_dataset)
    store.widths = dict(widths)
    store.d_in = sum(widths.values())
    return store


class PartOfStore:
    """What a runner and its trainer look up in a store, for one of the dictionaries that share it."""

    def __init__(self, shared: ResumableStore, reading: Reading) -> None:
        self.shared, self.reading = shared, reading

    @property
    def hook_name(self) -> str:
        """The hook that is read."""
        return self.reading.source.hook_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared, name)


class _OnDemand(Mapping[str, torch.Tensor]):
    """The batches of one step by name, each made when it is asked for, once, and not kept."""

    def __init__(self, names: Collection[str], make: Callable[[str], torch.Tensor]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class SharedBatches(Iterator[Mapping[str, torch.Tensor]]):
    """The batches of every dictionary from one stream of rows.

    Args:
        store: Of all hooks.
        readings: What each reads.
        prefetch: Batches that a thread makes ahead.
    """

    def __init__(self, store: ManyHookStore, readings: Mapping[str, Reading], prefetch: int = 0) -> None:
        self._store, self._readings = store, readings
        self._rows: Iterator[torch.Tensor] = store
        self._prefetcher: PrefetchingIterator[torch.Tensor] | None = None
        if prefetch:
            store.expect_prefetching(prefetch)
            self._prefetcher = PrefetchingIterator(iter(store), prefetch=prefetch)
            self._rows = PrefetchedBatches(self._prefetcher, store)

    def __next__(self) -> Mapping[str, torch.Tensor]:
        hooks = self._store.split(next(self._rows))
        return _OnDemand(self._readings, lambda name: self._readings[name](hooks))

    def paused(self) -> AbstractContextManager[None]:
        """Keep a prefetcher's thread from running the language model meanwhile."""
        return nullcontext() if self._prefetcher is None else self._prefetcher.paused()

    def save_to_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the place in the data into a folder."""
        if checkpoint_path is not None:
            self._store.save_to_checkpoint(checkpoint_path)

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go back to it."""
        self._store.load_from_checkpoint(checkpoint_path)

    def close(self) -> None:
        """End the prefetcher's thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()


class OwnBatches(Iterator[Mapping[str, torch.Tensor]]):
    """The batches of every dictionary from stores of their own, which cost nothing to have: caches."""

    def __init__(self, stores: Mapping[str, ResumableStore]) -> None:
        self._stores = stores

    def __next__(self) -> Mapping[str, torch.Tensor]:
        return _OnDemand(self._stores, lambda name: next(self._stores[name]))

    def save_to_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the place of each in the data into a folder of its own."""
        if checkpoint_path is None:
            return
        for name, store in self._stores.items():
            store.save_to_checkpoint(checkpoint_path / name)

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go back to it."""
        for name, store in self._stores.items():
            store.load_from_checkpoint(Path(checkpoint_path) / name)

    def close(self) -> None:
        """Nothing is left to do."""
