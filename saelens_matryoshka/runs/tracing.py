"""How much memory some code takes at its peak, counted from the tensors it makes.

On the meta device, or with fake tensors, nothing is computed and no memory taken, so that the forward pass of
a model of any size can be counted anywhere, in a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within, counts the bytes of the tensors that are made and still alive.

    What an operation takes for itself while it runs is not seen. Tensors that were there before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """alive now"""
        self.peak = 0
        """most that were alive at a time"""
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if id(storage) not in self._known:
                self._watch(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in self._known:
                self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage, n_bytes: int) -> None:
        self.bytes += n_bytes
        self._known[id(storage)] = weakref.finalize(storage, self._forget, id(storage), n_bytes)

    def _forget(self, key: int, n_bytes: int) -> None:
        self.bytes -= n_bytes
        del self._known[key]


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        # sparse tensors have no memory of their own: what they are made of is counted
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()
