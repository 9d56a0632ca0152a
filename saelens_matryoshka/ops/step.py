"""What one nested training step takes and returns: the interface that every implementation shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch


class NestedWeights(NamedTuple):
    """The parameters of a nested dictionary."""

    W_enc: torch.Tensor
    """`[d_in, d_sae]`"""
    b_enc: torch.Tensor
    """`[d_sae]`"""
    W_dec: torch.Tensor
    """`[d_sae, d_out]`"""
    b_dec: torch.Tensor
    """`[d_out]`"""
    W_skip: torch.Tensor | None = None
    """`[d_out, d_in]`, applied as `x @ W_skip.T`, the same in every level"""


@dataclass(frozen=True)
class NestedObjective:
    """The loss of a nested dictionary, as numbers: nothing here is learned."""

    widths: tuple[int, ...]
    """cumulative widths, the last one d_sae"""
    level_weights: tuple[float, ...]
    """weight of each level's reconstruction loss"""
    k: float
    """latents kept per row, on average over the batch"""
    selection: Literal["batch", "token"] = "batch"
    """keep the int(k·B) largest of the batch (BatchTopK), or the k largest of each row (TopK)"""
    subtract_b_dec: bool = False
    """subtract b_dec from the encoder's input (SAEs only)"""
    rescale_by_decoder_norm: bool = True
    """select by pre-activation times decoder norm, so that the scale of a decoder row does not count"""
    aux_coefficient: float = 0.0
    """weight of the loss by which dead latents learn the residual"""
    aux_per_level: bool = False
    """dead latents learn the residual of their own level instead of the whole dictionary's"""
    aux_k: int | None = None
    """dead latents that learn the residual of a row; None: d_out/2"""
    l1_coefficient: float = 0.0
    """weight of the L1 norm of the activations, each times its decoder norm"""

    def aux_budget(self, d_out: int) -> int:
        """Dead latents that learn the residual of a row."""
        return max(d_out // 2, 1) if self.aux_k is None else self.aux_k


class NestedStep(NamedTuple):
    """What one training step computes from a batch of B rows."""

    loss: torch.Tensor
    """scalar, to call backward on: Σ weight_l · level_losses_l + aux_loss + l1_loss"""
    level_losses: torch.Tensor
    """`[n_levels]`, squared error of each prefix: summed over d_out, mean over rows; detached"""
    aux_loss: torch.Tensor
    """scalar, coefficient included; detached"""
    l1_loss: torch.Tensor
    """scalar, coefficient included; detached"""
    prediction: torch.Tensor
    """`[B, d_out]`, output of the whole dictionary; detached"""
    feature_acts: torch.Tensor
    """`[B, d_sae]`, dense or sparse COO; times the decoder norm where selection is; detached"""
    hidden_pre: torch.Tensor
    """`[B, d_sae]`, what the encoder gives before the selection; detached"""
    batch_threshold: torch.Tensor
    """scalar: the smallest positive value kept, 0 if none was; in the units of feature_acts"""


class NestedStepFn(Protocol):
    """An implementation of the step. All of them are the same function, at different speeds."""

    def __call__(
        self,
        weights: NestedWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        objective: NestedObjective,
        *,
        dead: torch.Tensor | None,
    ) -> NestedStep:
        """Run one step.

        Args:
            weights: The parameters.
            x: Encoder input `[B, d_in]`.
            y: Target `[B, d_out]`; x itself for an SAE.
            objective: The loss.
            dead: Mask `[d_sae]` of the latents to revive with the auxiliary loss, or None.
        """
        ...
