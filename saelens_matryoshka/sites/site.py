"""A named tensor of a language model, and the names."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch

RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SITE_NAMES = (*RESIDUAL_SITES, "mlp_in", "ln2_normalized")


@dataclass(frozen=True, eq=False)
class Site:
    """A tensor of a language model: the activation at a hook, times `gain`, plus `offset`.

    Attributes:
        hook_name: the hook, as `run_with_cache(names_filter=[hook_name])` takes it.
        gain: [d], or None for 1.
        offset: [d], or None for 0.
    """

    hook_name: str
    gain: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        pairs = ((self.gain, other.gain), (self.offset, other.offset))
        return self.hook_name == other.hook_name and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash(self.hook_name)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """The site's tensor [..., d] from the activation [..., d] at `hook_name`.

        Computed in float32 or wider, and returned in the activation's dtype.
        """
        if self.gain is None and self.offset is None:
            return activation
        tensor = activation.to(torch.promote_types(activation.dtype, torch.float32))
        if self.gain is not None:
            tensor = tensor * self.gain.to(tensor)
        if self.offset is not None:
            tensor = tensor + self.offset.to(tensor)
        return tensor.to(activation.dtype)


def check_layer(layer: int, n_layers: int) -> None:
    """Check that a model of so many layers has this one.

    Raises:
        ValueError: it has not, or `layer` is no integer.
    """
    if isinstance(layer, bool) or not isinstance(layer, Integral):
        raise ValueError(f"layer={layer!r} must be an integer")
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer}, but the model has {n_layers} layers (0 to {n_layers - 1})")
