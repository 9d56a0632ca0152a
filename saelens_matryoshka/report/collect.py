"""Collect the samples of every latent in one pass over text, at about the cost of the forward pass.

They are of the inference model, after training: maxima kept during training would be those of an encoder
that is no more.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import HfDataset

from saelens_matryoshka.evaluation.activations import hook_activations, in_eval_mode
from saelens_matryoshka.evaluation.evaluator import flattened_heads, hooks_and_frame
from saelens_matryoshka.evaluation.tokens import is_excluded, require_count, special_token_ids, token_batches
from saelens_matryoshka.files.unfinished import Unfinished
from saelens_matryoshka.prefixes import inference_model
from saelens_matryoshka.report.collector import HISTOGRAM_BINS, Collector
from saelens_matryoshka.report.samples import Samples


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
    unfinished: Unfinished | None = None,
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
        unfinished: Where the state is kept until the end, and taken from if it is there: a collection that
            was ended goes on. The caller removes it once the samples are safe. None: nowhere.

    Raises:
        RunStopped: SIGINT or SIGTERM has come, and the state is kept in `unfinished`.
        ValueError: a number is out of range, the model has no such hook, its norms are folded otherwise than
            those of the model the SAE was trained on, or the dataset has no tokens.
    """
    _check(n_top, n_intervals, per_interval, before, after)
    sae = inference_model(sae)
    hook, _, _ = hooks_and_frame(sae, model)
    excluded = special_token_ids(model, exclude_special_tokens)
    collector = Collector(
        sae,
        n_top=n_top,
        n_intervals=n_intervals,
        per_interval=per_interval,
        before=before,
        after=after,
        seed=seed,
    )
    batches = functools.partial(
        token_batches, sae, model, dataset, n_tokens, context_size, batch_size_prompts
    )
    kept = nullcontext() if unfinished is None else unfinished.kept()
    with flattened_heads(sae), in_eval_mode(model), kept as keep_state:
        for tokens in _still_to_do(batches, collector, unfinished):
            source = hook_activations(model, tokens, [hook], model_kwargs)[hook]
            if sae.cfg.metadata.hook_head_index is not None:
                source = source[:, :, sae.cfg.metadata.hook_head_index]
            keep = torch.zeros_like(tokens, dtype=torch.bool)
            keep[:, slice(*(sae.cfg.metadata.seqpos_slice or (None,)))] = True
            keep &= ~is_excluded(tokens, excluded)
            collector.add(tokens, source.flatten(2).to(sae.device, sae.dtype), keep.to(sae.device))
            if on_progress is not None:
                on_progress(collector.n_seen)
            if keep_state is not None:
                keep_state(collector)
    return collector.samples()


def _still_to_do(
    batches: Callable[[], Iterator[torch.Tensor]], collector: Collector, unfinished: Unfinished | None
) -> Iterator[torch.Tensor]:
    """The batches that the collector has not had, once it is as it was left."""
    todo = batches()
    state = None if unfinished is None else unfinished.load()
    if state is None:
        return todo
    if _goes_over(todo, state["tokens"]):
        collector.restore(state)
        return todo
    warnings.warn("The text is not what it was when the collection was ended: starting anew.", stacklevel=3)
    return batches()


def _goes_over(batches: Iterator[torch.Tensor], tokens: torch.Tensor) -> bool:
    """Go over as many prompts as were collected `[prompts, context_size]`, and say whether they are these."""
    n_done = 0
    while n_done < len(tokens):
        batch = next(batches, None)
        if batch is None or not torch.equal(batch.cpu().int(), tokens[n_done : n_done + len(batch)]):
            return False
        n_done += len(batch)
    return True


def _check(n_top: int, n_intervals: int, per_interval: int, before: int, after: int) -> None:
    require_count("n_top", n_top, 1)
    require_count("per_interval", per_interval, 1)
    require_count("before", before, 0)
    require_count("after", after, 0)
    require_count("n_intervals", n_intervals, 1)
    if n_intervals not in (2, 4, 8, 16, 32, HISTOGRAM_BINS):
        raise ValueError(f"n_intervals={n_intervals} must be a power of two from 2 to {HISTOGRAM_BINS}.")
