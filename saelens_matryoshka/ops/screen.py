"""Upper bounds of all pre-activations at the price of bfloat16, to find the few that need computing.

Units for bfloat16 matrices do in one step what takes float32 eight or more. Of the product in bfloat16 no
value is used: it says which pre-activations can exceed a bound, and those alone are then computed in float32.
Nothing is dismissed that exceeds it. With a hat for what is rounded to bfloat16, and c = x - μ,

    x·w = ĉ·ŵ + (c - ĉ)·ŵ + c·(w - ŵ) + μ·w  ≤  ĉ·ŵ + ‖c - ĉ‖ ‖ŵ‖ + ‖c‖ ‖w - ŵ‖ + μ·w

by Cauchy and Schwarz, and each norm is computed from what the rounding did, which makes the bound twice as
close as the unit roundoff would. All terms but the first are products of something of the row and something
of the latent: further columns of the two matrices. μ is the mean of the batch, since activations of language
models lie far from 0 in a few dimensions, and their rounding would count for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from saelens_matryoshka.ops.order import kth_largest
from saelens_matryoshka.ops.scan import entries_above
from saelens_matryoshka.ops.step import NestedObjective

Scratch = Callable[..., torch.Tensor | None]
"""Gives memory kept from step to step, or None: as `SparseStep.scratch`"""

# On a GPU in float32 it should pay as well, but nobody has measured it.
ON_GPU = False

# A screen pays where it spares more than it costs: weights to round, which takes as long however few the
# rows, and entries to compute, each as dear as 15 of a product. Measured with two cores that have AMX.
_MIN_ROWS, _MIN_WIDTH, _MIN_SPARSITY = 512, 256, 96
# Of all entries, the share from which not to compute those that pass, but all.
_MAX_SHARE = 1 / 32
# How many pass for each that is above the cutoff.
_PASSING = 2
# Values rounded at a time: they stay in the cache of a CPU. Smaller parts would be a little faster still, but
# between all parts threads wait for each other, which takes long on a CPU with other work.
_CACHED_VALUES = 1 << 20
# Of a block, one row in so many, not a period that texts have, says how much would pass; and how many more
# than enough its sample should show.
_SAMPLED, _SLACK = 9, 1.2
# Columns a matrix for tensor cores or AMX comes in multiples of.
_ALIGNMENT = 32
# Relative: more than norms in float32 and bfloat16 round by, together. Absolute: more than a norm loses to
# squares that underflow.
_ROUND_UP, _UNDERFLOW = 2**-7, 1e-17


def pays(encoder_in: torch.Tensor, W_enc: torch.Tensor, objective: NestedObjective) -> bool:
    """Whether a step with weights `[d_in, d_sae]` is to screen: says the same in each step of a run."""
    d_in, d_sae = W_enc.shape
    return (
        objective.selection == "batch"
        and encoder_in.dtype == W_enc.dtype == torch.float32
        and not torch.is_autocast_enabled(W_enc.device.type)  # the product is in bfloat16 anyway
        and W_enc.T.is_contiguous()
        and is_large_enough(len(encoder_in), d_in, d_sae, objective.k)
        and has_bfloat16_matrices(W_enc.device.type)
    )


def is_large_enough(n_rows: int, d_in: int, d_sae: int, k: float) -> bool:
    """Whether a screen spares more than it costs."""
    return n_rows >= _MIN_ROWS and d_in >= _MIN_WIDTH and k * _MIN_SPARSITY <= d_sae


def has_bfloat16_matrices(device_type: str) -> bool:
    """Whether a device is known to gain by them: a CPU with AMX that torch uses, or a GPU if `ON_GPU`."""
    if device_type != "cpu":
        return ON_GPU and device_type == "cuda"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and has_amx()


def screen_width(d_in: int) -> int:
    """Columns of both matrices of a screen."""
    return -(-(d_in + 4) // _ALIGNMENT) * _ALIGNMENT


class Screen:
    """Which entries of `x W_enc + b_enc` can exceed a bound.

    Args:
        encoder_in: x, `[B, d_in]`, float32.
        W_enc: `[d_in, d_sae]`, float32, its transpose contiguous.
        b_enc: `[d_sae]`
        scratch: For what is as large as the weights or the batch.
    """

    rounding: torch.Tensor
    """`[d_sae]`: how much a latent's pre-activations can depend on the order in which they were summed"""

    def __init__(
        self, encoder_in: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, scratch: Scratch
    ) -> None:
        d_in = len(W_enc)
        self._scratch, self._width = scratch, screen_width(d_in)
        mean = encoder_in.mean(dim=0)
        rows, row_norms, row_errors = self._rounded("screened rows", encoder_in - mean)
        latents, latent_norms, latent_errors = self._rounded("screening weights", W_enc.T)
        # what sums in float32 are off by at most, here and where the entries are computed, times the norms
        off = self._width * 2 * torch.finfo(torch.float32).eps
        row_rounding = off * (torch.linalg.vector_norm(encoder_in, dim=1) + mean.norm() + row_norms)
        row_errors += row_rounding
        latent_norms *= 1 + _ROUND_UP  # of the rounded ones at least
        self.rounding = (row_rounding.max() * latent_norms).nan_to_num(0.0, 0.0, 0.0)
        bias = torch.addmv(b_enc, W_enc.T, mean) + b_enc.abs() * off
        rough_bias = bias.bfloat16()
        self._of_rows = [_rounded_up(values + _UNDERFLOW) for values in (row_errors, row_norms)]
        self._of_latents = [_rounded_up(values + _UNDERFLOW) for values in (latent_norms, latent_errors)]
        of_bias = [rough_bias, _rounded_up(bias - rough_bias)]
        of_bias_rows = torch.ones_like(self._of_rows[0])
        rows[:, d_in : d_in + 4] = torch.stack([*self._of_rows, of_bias_rows, of_bias_rows], dim=1)
        latents[:, d_in : d_in + 4] = torch.stack([*self._of_latents, *of_bias], dim=1)
        self._rows, self._latents = rows, latents
        self._whole: torch.Tensor | None = None
        sums = [values.float().sum() for values in (*self._of_rows, *self._of_latents, *of_bias)]
        self._is_finite = bool(torch.stack(sums).isfinite().all())

    def entries_above(
        self, bounds: torch.Tensor, block_rows: int, *, enough: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | float] | None:
        """All entries that can exceed a bound of their latent, and some that cannot.

        Args:
            bounds: `[d_sae]`, not negative.
            block_rows: How many rows to look at at a time.
            enough: How many entries are needed: where a sample of rows shows far more of them, all bounds are
                raised by a factor. If given, this is to be called anew when it was raised too far.

        Returns:
            Their flat indices `[n]`, increasing, and the factor; None where they would be so many, or the
            numbers are so large, that a screen is of no use.
        """
        if not self._is_finite:
            return None
        found, raised = [], 1.0
        limits = _limits(bounds)
        for start, product in self._blocks(block_rows):
            sample = product[::_SAMPLED].contiguous()
            places, bits = entries_above(sample, limits)
            passing = len(places)
            if enough is not None and len(product) == len(self._rows):
                wanted = int(_SLACK * enough * len(sample) / len(product))
                raised = self._raise(places, bits, bounds, wanted)
                limits = _limits(bounds * raised)
                passing = min(passing, _PASSING * wanted)
            if passing > _MAX_SHARE * sample.numel():
                return None
            found.append(entries_above(product, limits)[0] + start * product.shape[1])
        return torch.cat(found), raised

    def _raise(
        self, places: torch.Tensor, bits: torch.Tensor, bounds: torch.Tensor, enough: int
    ) -> torch.Tensor | float:
        """The factor, 1 or more, that all but so many of the sampled entries are below their bounds times."""
        if not 0 < enough < len(places):
            return 1.0
        rows, columns = places // len(self._latents) * _SAMPLED, places % len(self._latents)
        pairs = zip(self._of_rows, self._of_latents, strict=True)
        errors = sum(row.float()[rows] * latent.float()[columns] for row, latent in pairs)
        ratios = (bits.view(torch.bfloat16).float() - errors) / bounds[columns]
        return kth_largest(ratios, enough).squeeze().clamp(1.0, 1e6)  # finite, for bounds of 0

    def _blocks(self, block_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and the bits of the upper bounds of each block of rows, as `Encoder.blocks`."""
        if self._whole is not None:
            yield 0, self._whole
            return
        for start in range(0, len(self._rows), block_rows):
            rows = self._rows[start : start + block_rows]
            shape = (len(rows), len(self._latents))
            out = self._scratch("screen", rows.device, shape, torch.bfloat16)
            product = torch.mm(rows, self._latents.T, out=out).view(torch.int16)
            if len(rows) == len(self._rows):
                self._whole = product
            yield start, product

    def _rounded(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values `[n, d]` in bfloat16, `[n, width]` with 0 beyond d; their norms, and their errors' `[n]`."""
        n, d = values.shape
        rounded = self._scratch(name, values.device, (n, self._width), torch.bfloat16)
        if rounded is None:
            rounded = values.new_empty(n, self._width, dtype=torch.bfloat16)
        rounded[:, d:] = 0
        norms, errors = values.new_empty(n), values.new_empty(n)
        cached = max(1, _CACHED_VALUES // d) if values.device.type == "cpu" else n
        difference = values.new_empty(cached, d)
        for start in range(0, n, cached):
            part = slice(start, min(start + cached, n))
            block, error = values[part], difference[: part.stop - start]
            rounded[part, :d] = block
            error.copy_(rounded[part, :d]).sub_(block)
            torch.linalg.vector_norm(error, dim=1, out=errors[part])
            torch.linalg.vector_norm(block, dim=1, out=norms[part])
        return rounded, norms, errors


def _limits(bounds: torch.Tensor) -> torch.Tensor:
    """What the bits of an upper bound that reaches the bounds are above.

    Rounding keeps the order, and the order of positive numbers is that of their bits. What is negative has
    negative bits.
    """
    return (bounds * (1 - 1e-6)).clamp(min=0).bfloat16().view(torch.int16) - 1


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    return (values + values.abs() * _ROUND_UP).bfloat16()
