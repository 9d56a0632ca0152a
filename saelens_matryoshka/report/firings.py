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
        """None: what the latents do is left to `encode`, and its values are above 0 where they fire"""
        self._first = 0
        self._product = torch.empty(0, self.d_sae, dtype=sae.dtype, device=sae.device)
        self._fires = torch.empty(0, self.d_sae, dtype=torch.bool, device=sae.device)
        self._values = self._product

    def read(self, source: torch.Tensor, keep: torch.Tensor, first: int) -> Firings:
        """Encode tokens, in place of those before.

        Args:
            source: `[tokens, d_in]`.
            keep: `[tokens]` False where nothing is to count as firing.
            first: Position of the first of them in the stream.
        """
        n_tokens = len(source)
        if len(self._fires) < n_tokens:
            self._fires = self._fires.new_empty(n_tokens, self.d_sae)
        self._first, self._values = first, self._encode(source)
        self._values[~keep] = -torch.inf
        fires = self._fires[:n_tokens]
        torch.gt(self._values, 0 if self._thresholds is None else self._thresholds, out=fires)
        index = _nonzero(fires.view(-1))
        rows = torch.div(index, self.d_sae, rounding_mode="floor")
        values = self._values.view(-1)[index].float()
        return Firings(index - rows * self.d_sae, rows + first, values)

    def at(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Activations at positions `[n, window]` of a latent each `[n]`, float32; 0 where it is silent."""
        column = latents[:, None]
        values = self._values[positions - self._first, column]
        threshold = 0 if self._thresholds is None else self._thresholds[column]
        return torch.where(values > threshold, values, 0).float()

    def _encode(self, source: torch.Tensor) -> torch.Tensor:
        """Contiguous `[tokens, d_sae]`, positive and above the thresholds where a latent fires."""
        if self._thresholds is None:
            values = self.sae.encode(source)
            return (values.to_dense() if values.is_sparse else values).contiguous()
        if len(self._product) < len(source):
            self._product = self._product.new_empty(len(source), self.d_sae)
        rows = self.sae.process_sae_in(source)
        # the bias after the product, as in `encode`: with addmm the last bits differ
        b_enc: Any = self.sae.b_enc
        return torch.mm(rows, self.sae.W_enc, out=self._product[: len(source)]).add_(b_enc)


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Indices of a flat mask; numpy's take a seventh of the time of torch's on a CPU."""
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(mask.numpy().nonzero()[0])
