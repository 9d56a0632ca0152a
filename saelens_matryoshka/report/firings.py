"""Where the latents fire in a batch of tokens, at little more than the cost of the encoder's product.

A latent of a ReLU or JumpReLU model fires where its pre-activation exceeds a threshold, and its activation is
then the pre-activation: so the product is all that is written out, once, into memory that is kept. What
SAELens's `encode` gives beside it (a mask, a product with the mask, activations that are mostly zeros) takes
several times as long as the product itself where a dictionary is much wider than the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from saelens_matryoshka.seams import firing_thresholds

_CACHED_VALUES = 1 << 18


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
            index = _above(values.index_fill_(0, silent, 0), None, values.new_zeros(self.d_sae))
        else:
            values = self._multiply(source).index_fill_(0, silent, -torch.inf)
            index = _above(values, self.sae.b_enc, self._thresholds)
        self._first, self._values = first, values
        rows = torch.div(index, self.d_sae, rounding_mode="floor")
        found = values.view(-1).index_select(0, index).float()
        return Firings(index - rows * self.d_sae, rows + first, found)

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


def _above(values: torch.Tensor, bias: Any, thresholds: torch.Tensor) -> torch.Tensor:
    """Add the bias in place, and find the values `[tokens, d_sae]` above the thresholds: indices of the flat.

    The bias comes after the product, as in `encode`: with addmm the last bits would differ. On a CPU this is
    bound by memory, so it goes over some rows at a time, which stay in the cache between the steps; and numpy
    compares and counts in less than half of torch's time.
    """
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        values = values if bias is None else values.add_(bias)
        return (values > thresholds).view(-1).nonzero().squeeze(1)
    found, n_rows = [], max(1, _CACHED_VALUES // values.shape[1])
    limits = thresholds.numpy()
    for start in range(0, len(values), n_rows):
        block = values[start : start + n_rows]
        if bias is not None:
            block.add_(bias)
        found.append((block.numpy() > limits).ravel().nonzero()[0] + start * values.shape[1])
    return torch.from_numpy(np.concatenate(found))
