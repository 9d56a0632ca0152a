"""Where the latents fire in a batch of tokens, at little more than the cost of the encoder's product.

A latent of a ReLU or JumpReLU model fires where its pre-activation exceeds a threshold, and its activation is
then the pre-activation: so the product is all that is written out, once, into memory that is kept. What
SAELens's `encode` gives beside it (a mask, a product with the mask, activations that are mostly zeros) takes
several times as long as the product itself where a dictionary is much wider than the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from saelens_matryoshka.ops.scan import entries_above
from saelens_matryoshka.seams import firing_thresholds


@dataclass
class Firings:
    """The positive activations of a batch of prompts, one entry each, by position and then by latent."""

    latents: torch.Tensor
    """`[n]`"""
    positions: torch.Tensor
    """`[n]`, of the token, counted over all prompts of the stream"""
    values: torch.Tensor
    """`[n]`, float32"""

    def __getitem__(self, which: torch.Tensor) -> Firings:
        return Firings(self.latents[which], self.positions[which], self.values[which])


class Activations:
    """The feature activations of the batch that was read last.

    Args:
        sae: A stock SAE or transcoder, its reshaping of heads turned off.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae, self.d_sae = sae, int(sae.cfg.d_sae)
        self._thresholds = firing_thresholds(sae)
        """None: what the latents do is left to `encode`, whose values are above 0 where they fire"""
        self._first = 0
        self._product = torch.empty(0, self.d_sae, dtype=sae.dtype, device=sae.device)
        self._values = self._product

    def read(self, source: torch.Tensor, keep: torch.Tensor, first: int) -> Firings:
        """Encode tokens, in place of those before.

        Args:
            source: `[tokens, d_in]`.
            keep: `[tokens]` False where nothing is to count as firing.
            first: Position of the first of them in the stream.
        """
        silent = (~keep).nonzero().squeeze(1)
        if self._thresholds is None:
            values = self.sae.encode(source)
            values = (values.to_dense() if values.is_sparse else values).contiguous()
            index, found = entries_above(values.index_fill_(0, silent, 0), values.new_zeros(self.d_sae))
        else:
            values = self._multiply(source).index_fill_(0, silent, -torch.inf)
            # the bias after the product, as in `encode`: with addmm the last bits would differ
            bias: Any = self.sae.b_enc
            index, found = entries_above(values, self._thresholds, bias=bias)
        self._first, self._values = first, values
        rows = torch.div(index, self.d_sae, rounding_mode="floor")
        return Firings(index - rows * self.d_sae, rows + first, found.float())

    def at(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Activations at positions `[n, window]` of a latent each `[n]`, float32; 0 where it is silent."""
        column = latents[:, None]
        values = self._values[positions - self._first, column]
        threshold = 0 if self._thresholds is None else self._thresholds[column]
        return torch.where(values > threshold, values, 0).float()

    def _multiply(self, source: torch.Tensor) -> torch.Tensor:
        """The encoder's product `[tokens, d_sae]`, without the bias, in memory that is used again."""
        if len(self._product) < len(source):
            self._product = self._product.new_empty(len(source), self.d_sae)
        rows: Any = self.sae.process_sae_in(source)
        return torch.mm(rows, self.sae.W_enc, out=self._product[: len(source)])
