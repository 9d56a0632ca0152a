"""Collect the samples of every latent in one pass over text, at about the cost of the forward pass.

They are of the inference model, after training: maxima kept during training would be those of an encoder
that is no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import HfDataset

from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.evaluation.evaluator import hooks_and_frame
from saelens_matryoshka.evaluation.tokens import special_token_ids, token_batches
from saelens_matryoshka.prefixes import inference_model
from saelens_matryoshka.report.accumulate import ExamplePool, Firings, Scales
from saelens_matryoshka.report.samples import Examples, Samples

# Feature activations that are held at a time.
_ACTIVATION_VALUES = 1 << 25
_HISTOGRAM_BINS = 64


@torch.no_grad()
def collect_samples(
    sae: SAE[Any],
    model: Any,
    dataset: HfDataset | str | torch.Tensor,
    *,
    n_tokens: int = 1_000_000,
    n_top: int = 20,
    n_intervals: int = 8,
    per_interval: int = 3,
    before: int = 20,
    after: int = 20,
    context_size: int | None = None,
    batch_size_prompts: int = 8,
    exclude_special_tokens: bool | list[int] = True,
    seed: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Samples:
    """The strongest examples of every latent, and a uniform sample of its firings in intervals of strength.

    Memory is that of one batch's activations, of the examples (`d_sae * (n_top + n_intervals * per_interval)
    * (before + 1 + after)` float32) and of the tokens (4 bytes each).

    Args:
        sae: SAE or transcoder, ours or stock; a training object is taken as the model it would be saved as.
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        dataset: As `sm.evaluate` takes it.
        n_tokens: About how many tokens to run over.
        n_top: Strongest examples kept of each latent, one per prompt.
        n_intervals: Equal intervals of [0, s], where s is the power of two above a latent's largest
            activation; a power of two, so that about half of them to all lie below the largest.
        per_interval: Examples of each, drawn uniformly from the firings in it.
        before: Tokens of an example before the one it is about.
        after: And after it.
        context_size: Tokens per prompt. None: what the SAE was trained with.
        batch_size_prompts: Prompts per forward pass.
        exclude_special_tokens: Leave BOS, EOS, padding and the like (or the given ids) out of the examples
            and the statistics.
        seed: Of the drawing.
        model_kwargs: Passed on when the language model is called.
        on_progress: Called with the number of tokens done after every batch.

    Raises:
        ValueError: a number is out of range, the model has no such hook, its norms are folded otherwise than
            those of the model the SAE was trained on, or the dataset has no tokens.
    """
    _check(n_tokens, n_top, n_intervals, per_interval, before, after, batch_size_prompts)
    sae = inference_model(sae)
    hook, _, _ = hooks_and_frame(sae, model)
    excluded = special_token_ids(model, exclude_special_tokens)
    collector = _Collector(sae, n_top, n_intervals, per_interval, before, after, seed)
    was_training, had_reshaping = model.training, sae.hook_z_reshaping_mode
    model.eval()
    sae.turn_off_forward_pass_hook_z_reshaping()  # heads are flattened here
    try:
        for tokens in token_batches(sae, model, dataset, n_tokens, context_size, batch_size_prompts):
            source = hook_activations(model, tokens, [hook], model_kwargs)[hook]
            if sae.cfg.metadata.hook_head_index is not None:
                source = source[:, :, sae.cfg.metadata.hook_head_index]
            keep = torch.zeros_like(tokens, dtype=torch.bool)
            keep[:, slice(*(sae.cfg.metadata.seqpos_slice or (None,)))] = True
            if excluded is not None:
                keep &= ~torch.isin(tokens, excluded.to(tokens.device))
            collector.add(tokens, source.flatten(2).to(sae.device, sae.dtype), keep.to(sae.device))
            if on_progress is not None:
                on_progress(collector.n_seen)
    finally:
        model.train(was_training)
        if had_reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()
    return collector.samples()


def _check(
    n_tokens: int,
    n_top: int,
    n_intervals: int,
    per_interval: int,
    before: int,
    after: int,
    batch_size_prompts: int,
) -> None:
    for name, value in {
        "n_tokens": n_tokens,
        "n_top": n_top,
        "per_interval": per_interval,
        "batch_size_prompts": batch_size_prompts,
    }.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if before < 0 or after < 0:
        raise ValueError(f"before={before} and after={after} must not be negative.")
    if n_intervals not in (2, 4, 8, 16, 32, _HISTOGRAM_BINS):
        raise ValueError(f"n_intervals={n_intervals} must be a power of two from 2 to {_HISTOGRAM_BINS}.")


class _Collector:
    """What has been kept so far, and how a batch is added to it."""

    def __init__(
        self,
        sae: SAE[Any],
        n_top: int,
        n_intervals: int,
        per_interval: int,
        before: int,
        after: int,
        seed: int,
    ) -> None:
        self.sae, self.n_intervals, self.before, self.after = sae, n_intervals, before, after
        device, d_sae = torch.device(sae.device), int(sae.cfg.d_sae)
        window = before + 1 + after
        self.tokens: list[torch.Tensor] = []
        self.n_prompts = self.n_seen = self.n_tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.sums = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.largest = torch.zeros(d_sae, device=device)
        self.smallest = torch.full((d_sae,), torch.inf, device=device)
        self.scales = Scales(d_sae, _HISTOGRAM_BINS, device)
        self.top = ExamplePool(d_sae, n_top, window, device)
        self.drawn = ExamplePool(d_sae * n_intervals, per_interval, window, device)
        self.offsets = torch.arange(-before, after + 1, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def add(self, tokens: torch.Tensor, source: torch.Tensor, keep: torch.Tensor) -> None:
        """Add prompts: tokens and mask `[prompts, context_size]`, source `[prompts, context_size, d_in]`."""
        at_a_time = max(1, _ACTIVATION_VALUES // (tokens.shape[1] * int(self.sae.cfg.d_sae)))
        for part, mask in zip(source.split(at_a_time), keep.split(at_a_time), strict=True):
            acts = self.sae.encode(part)
            if acts.is_sparse:
                acts = acts.to_dense()
            self._add(acts.float().mul_(mask[..., None]), mask)
        self.tokens.append(tokens.to("cpu", torch.int32))
        self.n_seen += tokens.numel()

    def _add(self, acts: torch.Tensor, keep: torch.Tensor) -> None:
        n_prompts, context, _ = acts.shape
        first = self.n_prompts * context
        self.n_prompts += n_prompts
        self.n_tokens += int(keep.sum())
        flat = acts.flatten(0, 1)
        rows, latents = (flat > 0).nonzero(as_tuple=True)
        firings = Firings(latents, first + rows, (first + rows) // context, flat[rows, latents])
        if not len(latents):
            return
        self.fired += torch.bincount(latents, minlength=len(self.fired))
        self.sums.index_add_(0, latents, firings.values.double())
        self.largest.scatter_reduce_(0, latents, firings.values, "amax")
        self.smallest.scatter_reduce_(0, latents, firings.values, "amin")
        doublings = self.scales.grow(self.largest)
        for step in range(int(doublings.max())):
            self.drawn.join_pairs((doublings > step).nonzero().squeeze(1), self.n_intervals)
        self.scales.add(firings)

        strongest = self._strongest_per_prompt(firings)
        self._keep(self.top, strongest, strongest.latents, strongest.values, acts, first)
        interval = self.scales.bin_of(firings, self.n_intervals)
        keys = torch.rand(len(latents), generator=self.generator, device=acts.device)
        self._keep(self.drawn, firings, latents * self.n_intervals + interval, keys, acts, first)

    def _strongest_per_prompt(self, firings: Firings) -> Firings:
        """Each latent's strongest firing of every prompt, of those that may be among its strongest of all."""
        firings = firings[firings.values > self.top.rank.amin(dim=1)[firings.latents]]
        order = firings.values.argsort(descending=True)
        pair = firings.latents[order] * (self.n_prompts + 1) + firings.prompts[order]
        pair, by_pair = pair.sort(stable=True)
        is_first = torch.ones_like(pair, dtype=torch.bool)
        is_first[1:] = pair[1:] != pair[:-1]
        return firings[order[by_pair[is_first]]]

    def _keep(
        self,
        pool: ExamplePool,
        firings: Firings,
        groups: torch.Tensor,
        rank: torch.Tensor,
        acts: torch.Tensor,
        first: int,
    ) -> None:
        taken, groups, slots = pool.offer(groups, rank)
        chosen, context = firings[taken], acts.shape[1]
        column = chosen.positions[:, None] % context + self.offsets
        inside = (column >= 0) & (column < context)
        row = (chosen.positions - first) // context
        windows = acts[row[:, None], column.clamp(0, context - 1), chosen.latents[:, None]] * inside
        pool.put(
            groups,
            slots,
            rank=rank[taken],
            positions=chosen.positions,
            values=chosen.values,
            windows=windows,
        )

    def samples(self) -> Samples:
        """All of it, sorted, on the CPU."""
        d_sae = len(self.fired)
        if not self.n_tokens:
            raise ValueError("dataset: all its tokens are special tokens, so there is nothing to sample.")
        return Samples(
            tokens=torch.cat(self.tokens),
            n_tokens=self.n_tokens,
            fired=self.fired.cpu(),
            sums=self.sums.cpu(),
            largest=self.largest.cpu(),
            smallest=torch.where(self.fired > 0, self.smallest, 0).cpu(),
            scale=self.scales.scale.cpu(),
            histogram=self.scales.counts.cpu(),
            top=_sorted(self.top, d_sae),
            intervals=_sorted(self.drawn, d_sae),
            n_intervals=self.n_intervals,
            before=self.before,
            after=self.after,
            about={},
        )


def _sorted(pool: ExamplePool, d_sae: int) -> Examples:
    """A pool's examples by activation, missing ones last, the groups of a latent one after the other."""
    order = torch.where(pool.positions < 0, -torch.inf, pool.values).argsort(dim=1, descending=True)
    windows = pool.windows.gather(1, order[..., None].expand_as(pool.windows))
    return Examples(
        pool.positions.gather(1, order).view(d_sae, -1).cpu(),
        pool.values.gather(1, order).view(d_sae, -1).cpu(),
        windows.view(d_sae, -1, windows.shape[-1]).cpu(),
    )
