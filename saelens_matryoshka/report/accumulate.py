"""What is kept of a stream of activations, for every latent at once and in memory that does not grow.

A latent's strongest examples, uniform samples of its firings in equal intervals of activation, and a
histogram. The largest activation is not known while the stream runs, so histogram and intervals span
[0, scale], and the scale doubles when an activation exceeds it: then neighbouring bins are joined in pairs.
Counts add up exactly. An interval's sample are the firings with the highest random keys, and the highest keys
of two intervals together are among the highest of each: the joined sample is again a uniform one.
"""

from __future__ import annotations

import torch

from saelens_matryoshka.report.firings import Firings

_LARGEST = torch.iinfo(torch.int32).max


class ExamplePool:
    """A fixed number of examples per group (a latent, or an interval of one), those with the highest rank.

    Args:
        n_groups: How many groups.
        size: Examples kept of each.
        window: Tokens of an example's context.
        device: Where they are kept.
    """

    def __init__(self, n_groups: int, size: int, window: int, device: torch.device) -> None:
        self.size = size
        self.lowest = torch.full((n_groups,), -torch.inf, device=device)
        """`[n_groups]` what a candidate's rank must exceed"""
        self.rank = torch.full((n_groups, size), -torch.inf, device=device)
        self.positions = torch.full((n_groups, size), -1, dtype=torch.long, device=device)
        self.values = torch.zeros(n_groups, size, device=device)
        self.windows = torch.zeros(n_groups, size, window, device=device)

    def offer(
        self, groups: torch.Tensor, rank: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decide which of the candidates replace which examples.

        Args:
            groups: `[n]` group of each candidate.
            rank: `[n]` finite, float32, not negative.

        Returns:
            Which candidates are taken, and the group and slot of each, where the caller puts them with `put`.
        """
        better = (rank > self.lowest[groups]).nonzero().squeeze(1)
        order = better[order_within(groups[better], rank[better])]
        touched, sizes = groups[order].unique_consecutive(return_counts=True)
        starts = sizes.cumsum(0) - sizes
        row = torch.repeat_interleave(torch.arange(len(touched), device=groups.device), sizes)
        column = torch.arange(len(order), device=groups.device) - starts[row]
        first = column < self.size
        order, row, column = order[first], row[first], column[first]

        offered = torch.full((len(touched), self.size), -torch.inf, device=rank.device)
        offered[row, column] = rank[order]
        candidate = torch.zeros(len(touched), self.size, dtype=torch.long, device=rank.device)
        candidate[row, column] = order
        chosen = torch.cat([self.rank[touched], offered], dim=1).topk(self.size, dim=1).indices
        kept = torch.zeros(len(touched), 2 * self.size, dtype=torch.bool, device=rank.device)
        kept.scatter_(1, chosen, True)
        # A row has as many free slots as taken candidates, and nonzero goes by rows: they pair up.
        row, slot = (~kept[:, : self.size]).nonzero(as_tuple=True)
        taken = candidate[kept[:, self.size :]]
        real = offered[kept[:, self.size :]] > -torch.inf
        return taken[real], touched[row[real]], slot[real]

    def put(
        self,
        groups: torch.Tensor,
        slots: torch.Tensor,
        *,
        rank: torch.Tensor,
        positions: torch.Tensor,
        values: torch.Tensor,
        windows: torch.Tensor,
    ) -> None:
        """Put examples, whose contexts' activations are `windows` `[n, window]`, into their slots."""
        self.rank[groups, slots] = rank
        self.lowest[groups] = self.rank[groups].amin(dim=1)
        self.positions[groups, slots] = positions
        self.values[groups, slots] = values
        self.windows[groups, slots] = windows

    def join_pairs(self, latents: torch.Tensor, n_intervals: int) -> None:
        """Join intervals 2i and 2i + 1 of some latents into i, and empty the upper half."""
        if not len(latents):
            return
        groups = latents[:, None] * n_intervals + torch.arange(n_intervals, device=latents.device)
        half, both = n_intervals // 2, 2 * self.size
        best, chosen = self.rank[groups].view(len(latents), half, both).topk(self.size, dim=-1)
        for tensor, joined, empty in (
            (self.rank, best, -torch.inf),
            (self.positions, self._pick(self.positions, groups, chosen, half), -1),
            (self.values, self._pick(self.values, groups, chosen, half), 0),
            (self.windows, self._pick(self.windows, groups, chosen, half), 0),
        ):
            tensor[groups[:, :half]] = joined
            tensor[groups[:, half:]] = empty
        self.lowest[groups] = self.rank[groups].amin(dim=-1)

    def _pick(
        self, tensor: torch.Tensor, groups: torch.Tensor, chosen: torch.Tensor, half: int
    ) -> torch.Tensor:
        paired = tensor[groups].reshape(len(groups), half, 2 * self.size, *tensor.shape[2:])
        index = chosen.view(*chosen.shape, *[1] * (paired.dim() - 3))
        return paired.gather(2, index.expand(*chosen.shape, *paired.shape[3:]))


class Scales:
    """The span [0, scale] of every latent's histogram and intervals, a power of two above its largest value.

    Args:
        d_sae: How many latents.
        n_bins: Bins of the histogram, even.
        device: Where they are kept.
    """

    def __init__(self, d_sae: int, n_bins: int, device: torch.device) -> None:
        self.scale = torch.zeros(d_sae, device=device)
        self.counts = torch.zeros(d_sae, n_bins, dtype=torch.long, device=device)

    def grow(self, largest: torch.Tensor) -> torch.Tensor:
        """Make room for the largest value of each latent `[d_sae]`.

        Returns:
            `[d_sae]` how often each latent's bins were joined in pairs.
        """
        needed = torch.where(largest > 0, torch.exp2(largest.log2().floor() + 1), 0)
        first = (self.scale == 0) & (needed > 0)
        self.scale = torch.where(first, needed, self.scale)
        doublings = torch.where(needed > self.scale, (needed / self.scale).log2().round(), 0).long()
        for step in range(int(doublings.max())):
            latents = (doublings > step).nonzero().squeeze(1)
            counts = self.counts[latents]
            joined = counts.view(len(latents), -1, 2).sum(dim=-1)
            self.counts[latents] = torch.cat([joined, torch.zeros_like(joined)], dim=1)
        self.scale = torch.maximum(self.scale, needed)
        return doublings

    def add(self, firings: Firings) -> torch.Tensor:
        """Count the values, after `grow`.

        Returns:
            `[n]` of each the bin, counted over all latents: `latent * n_bins + bin`.
        """
        n_bins = self.counts.shape[1]
        share = firings.values / self.scale[firings.latents]
        index = (share * n_bins).long().clamp_(0, n_bins - 1).add_(firings.latents, alpha=n_bins)
        self.counts.view(-1).scatter_add_(0, index, torch.ones_like(index))
        return index


def order_within(groups: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The order by group and, within one, from the highest rank down; of equals, the first stays first.

    By one sort of whole numbers: those of 32 bits that a float32 which is not negative consists of are in the
    order of the floats.

    Args:
        groups: `[n]`, not negative, below 2**31.
        rank: `[n]` finite, float32, not negative.
    """
    return ((groups << 32) + (_LARGEST - rank.view(torch.int32))).argsort(stable=True)
