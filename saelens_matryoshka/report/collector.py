"""What has been kept of the text so far, and how a batch of it is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sae_lens import SAE

from saelens_matryoshka.evaluation.metrics import float64_device
from saelens_matryoshka.report.accumulate import ExamplePool, Scales, order_within
from saelens_matryoshka.report.firings import Activations, Firings
from saelens_matryoshka.report.samples import Examples, Samples

# Pre-activations that are held at a time.
_ACTIVATION_VALUES = 1 << 25
HISTOGRAM_BINS = 64


class Collector:
    """Keeps samples of a stream of prompts. See `collect_samples`, also for what the numbers are."""

    def __init__(
        self,
        sae: SAE[Any],
        *,
        n_top: int,
        n_intervals: int,
        per_interval: int,
        before: int,
        after: int,
        seed: int,
    ) -> None:
        self.n_intervals, self.before, self.after = n_intervals, before, after
        self._acts = Activations(sae)
        device, d_sae = torch.device(sae.device), int(sae.cfg.d_sae)
        window = before + 1 + after
        self.tokens: list[torch.Tensor] = []
        self.n_seen = self.n_tokens = 0
        self.sums = torch.zeros(d_sae, dtype=torch.float64, device=float64_device(device))
        self.largest = torch.zeros(d_sae, device=device)
        self.smallest = torch.full((d_sae,), torch.inf, device=device)
        self.scales = Scales(d_sae, HISTOGRAM_BINS, device)
        self.top = ExamplePool(d_sae, n_top, window, device)
        self.drawn = ExamplePool(d_sae * n_intervals, per_interval, window, device)
        self.offsets = torch.arange(-before, after + 1, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def add(self, tokens: torch.Tensor, source: torch.Tensor, keep: torch.Tensor) -> None:
        """Add prompts: tokens and mask `[prompts, context_size]`, source `[prompts, context_size, d_in]`."""
        context = tokens.shape[1]
        at_a_time = max(1, _ACTIVATION_VALUES // (context * len(self.largest)))
        first = self.n_seen
        for part, mask in zip(source.split(at_a_time), keep.split(at_a_time), strict=True):
            self._add(self._acts.read(part.flatten(0, 1), mask.flatten(), first), context)
            first += mask.numel()
        self.tokens.append(tokens.to("cpu", torch.int32))
        self.n_tokens += int(keep.sum())
        self.n_seen = first

    def _add(self, firings: Firings, context: int) -> None:
        latents, values = firings.latents, firings.values
        if not len(latents):
            return
        place = self.sums.device
        self.sums += torch.bincount(
            latents.to(place), weights=values.to(place).double(), minlength=len(self.sums)
        )
        self.largest.scatter_reduce_(0, latents, values, "amax")
        self.smallest.scatter_reduce_(0, latents, values, "amin")
        doublings = self.scales.grow(self.largest)
        for step in range(int(doublings.max())):
            self.drawn.join_pairs((doublings > step).nonzero().squeeze(1), self.n_intervals)
        bins = self.scales.add(firings)

        strongest = self._strongest_per_prompt(firings, context)
        self._keep(self.top, strongest, strongest.latents, strongest.values, context)
        keys = torch.rand(len(latents), generator=self.generator, device=latents.device)
        self._keep(self.drawn, firings, bins // (HISTOGRAM_BINS // self.n_intervals), keys, context)

    def _strongest_per_prompt(self, firings: Firings, context: int) -> Firings:
        """Each latent's strongest firing of every prompt, of those that may be among its strongest of all."""
        firings = firings[firings.values > self.top.lowest[firings.latents]]
        if not len(firings.latents):
            return firings
        prompts = firings.positions // context
        prompts -= prompts[0].clone()  # the lowest
        pair = firings.latents * (prompts[-1] + 1) + prompts
        order = order_within(pair, firings.values)
        pair = pair[order]
        is_first = torch.ones_like(pair, dtype=torch.bool)
        is_first[1:] = pair[1:] != pair[:-1]
        return firings[order[is_first]]

    def _keep(
        self, pool: ExamplePool, firings: Firings, groups: torch.Tensor, rank: torch.Tensor, context: int
    ) -> None:
        taken, groups, slots = pool.offer(groups, rank)
        chosen = firings[taken]
        column = chosen.positions[:, None] % context + self.offsets
        inside = (column >= 0) & (column < context)
        around = chosen.positions[:, None] + torch.where(inside, self.offsets, 0)
        pool.put(
            groups,
            slots,
            rank=rank[taken],
            positions=chosen.positions,
            values=chosen.values,
            windows=self._acts.at(chosen.latents, around) * inside,
        )

    def samples(self) -> Samples:
        """All of it, sorted, on the CPU.

        Raises:
            ValueError: no token counted.
        """
        d_sae, fired = len(self.largest), self.scales.counts.sum(dim=1)
        if not self.n_tokens:
            raise ValueError("dataset: all its tokens are special tokens, so there is nothing to sample.")
        return Samples(
            tokens=torch.cat(self.tokens),
            n_tokens=self.n_tokens,
            fired=fired.cpu(),
            sums=self.sums.cpu(),
            largest=self.largest.cpu(),
            smallest=torch.where(fired > 0, self.smallest, 0).cpu(),
            scale=self.scales.scale.cpu(),
            histogram=self.scales.counts.cpu(),
            top=_sorted(self.top, d_sae),
            intervals=_sorted(self.drawn, d_sae),
            n_intervals=self.n_intervals,
            before=self.before,
            after=self.after,
            about={},
        )

    def state(self) -> dict[str, torch.Tensor]:
        """All that `restore` needs to go on from here; of the tensors that are kept, no copies."""
        return {
            **self._kept(),
            "tokens": torch.cat(self.tokens),
            "n_tokens": torch.tensor(self.n_tokens),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Be as the collector, made with the same numbers, was when it gave this state."""
        for name, tensor in self._kept().items():
            tensor.copy_(state[name])
        self.tokens = [state["tokens"]]
        self.n_seen, self.n_tokens = state["tokens"].numel(), int(state["n_tokens"])
        self.generator.set_state(state["generator"])

    def _kept(self) -> dict[str, torch.Tensor]:
        statistics = {name: getattr(self, name) for name in ("sums", "largest", "smallest")}
        parts = {"scales": self.scales, "top": self.top, "drawn": self.drawn}
        return statistics | {
            f"{part}.{name}": value
            for part, kept in parts.items()
            for name, value in vars(kept).items()
            if isinstance(value, torch.Tensor)
        }


def _sorted(pool: ExamplePool, d_sae: int) -> Examples:
    """A pool's examples by activation, missing ones last, the groups of a latent one after the other."""
    order = torch.where(pool.positions < 0, -torch.inf, pool.values).argsort(dim=1, descending=True)
    windows = pool.windows.gather(1, order[..., None].expand_as(pool.windows))
    return Examples(
        pool.positions.gather(1, order).view(d_sae, -1).cpu(),
        pool.values.gather(1, order).view(d_sae, -1).cpu(),
        windows.view(d_sae, -1, windows.shape[-1]).cpu(),
    )
