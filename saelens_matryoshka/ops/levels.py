"""What a step has to know of the levels, on the device of the weights, before any batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from saelens_matryoshka.ops.step import NestedObjective
from saelens_matryoshka.widths import latent_levels


class Levels(NamedTuple):
    """To be kept from step to step: to copy it to a GPU is to wait for the GPU."""

    widths: tuple[int, ...]
    """cumulative"""
    weights: tuple[float, ...]
    """of the losses"""
    weight_tensor: torch.Tensor
    """the same, `[n_levels]`, in the dtype of the losses"""
    of_latent: torch.Tensor
    """`[d_sae]`"""
    bounds: torch.Tensor
    """`[n_levels + 1]`: 0 and the widths"""

    @classmethod
    def of(cls, objective: NestedObjective, W_dec: torch.Tensor) -> Levels:
        """Of an objective, for a decoder."""
        device, dtype = W_dec.device, torch.promote_types(W_dec.dtype, torch.float32)
        return cls(
            objective.widths,
            objective.level_weights,
            torch.tensor(objective.level_weights, dtype=dtype, device=device),
            latent_levels(objective.widths, device=device),
            torch.tensor([0, *objective.widths], device=device),
        )
