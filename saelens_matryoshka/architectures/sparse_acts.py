"""Feature activations as SAELens's trainer takes them: sparse, and cheap to count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from saelens_matryoshka.ops.entries import sum_by_latent

_OVER_ROWS = ((0,), (-2,))
_ENTRY_BY_ENTRY = (torch.Tensor.bool, torch.Tensor.float)


class SparseActs(torch.Tensor):
    """A sparse COO tensor `[B, d_sae]` in all but its sum over rows, which is dense.

    In every step SAELens's trainer sums over rows twice: which latents fired, and how often. torch's sum of a
    sparse tensor is sparse again, for which it sorts all entries, and the host of a GPU has to wait. This one
    adds them up. Whatever else is asked is asked of the tensor within.
    """

    _coo: torch.Tensor

    @staticmethod
    def __new__(cls, coo: torch.Tensor) -> SparseActs:
        """Wrap a coalesced tensor `[B, d_sae]`."""
        acts = torch.Tensor._make_wrapper_subclass(cls, coo.shape, dtype=coo.dtype, device=coo.device)
        acts._coo = coo
        return acts

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, named = tree_map_only(cls, lambda acts: acts._coo, (args, kwargs or {}))
        if func is torch.Tensor.sum and args[1:] in _OVER_ROWS and not named:
            coo = args[0]
            return sum_by_latent(coo._indices()[1], coo._values(), coo.shape[1]).to(coo.dtype)
        result = func(*args, **named)
        return cls(result) if func in _ENTRY_BY_ENTRY else result

    # which a wrapper must have: what operators ask from within torch is answered in the same way
    __torch_dispatch__ = __torch_function__
