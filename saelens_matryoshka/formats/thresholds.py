"""Thresholds for models that have none that another tool can use, fitted on data.

A TopK model keeps the k largest latents of every token, which a JumpReLU model cannot do. The nearest it can
do is one threshold (in units of what TopK compares) at which it keeps as many latents per token on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAE

from saelens_matryoshka.architectures.calibration import threshold_for_l0
from saelens_matryoshka.evaluation.activations import hook_activations, in_eval_mode, require_width
from saelens_matryoshka.evaluation.tokens import is_excluded, special_token_ids, token_batches
from saelens_matryoshka.formats.coder import SparseCoder, build
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.sites import check_hook, hook_names

_GUESS_ROWS = 256


@torch.no_grad()
def fit_threshold(coder: SparseCoder, rows: torch.Tensor, l0: float) -> SparseCoder:
    """The JumpReLU coder of the same weights that keeps l0 latents per row on average.

    Latents are compared by their contribution, the pre-activation times the decoder norm, if the coder has
    thresholds so far (which may be of different scales); a TopK coder compares the pre-activations alone.

    Args:
        coder: The coder.
        rows: What its hook gives, `[n, d_in]`.
        l0: Wanted mean number of active latents.

    Raises:
        FormatError: l0 is not between 0 and d_sae, or there are no rows.
    """
    if not isinstance(rows, torch.Tensor):
        raise FormatError(f"rows is a {type(rows).__name__}, and must be a tensor.")
    if not 0 < l0 <= coder.d_sae:
        raise FormatError(f"l0={l0:g} must be larger than 0 and at most d_sae={coder.d_sae}.")
    if rows.dim() != 2 or len(rows) == 0 or rows.shape[1] != coder.d_in:
        raise FormatError(f"rows has shape {list(rows.shape)}, expected [at least 1, d_in={coder.d_in}].")
    rows = rows.float()
    if coder.layer_norm:
        rows = rows - rows.mean(dim=-1, keepdim=True)
        rows = rows / (rows.std(dim=-1, keepdim=True) + 1e-5)
    if coder.subtract_b_dec:
        rows = rows - coder.b_dec.float()
    norms = None if coder.k is not None else coder.W_dec.float().norm(dim=-1)
    weights = (coder.W_enc.float(), coder.b_enc.float(), norms, l0)
    guess = threshold_for_l0(rows[:_GUESS_ROWS], *weights, guess=0.0)
    threshold = torch.full_like(coder.b_enc, threshold_for_l0(rows, *weights, guess=guess))
    if norms is not None:
        threshold = threshold / norms.clamp(min=1e-8).to(threshold)
    fitted = coder.with_tensors(threshold=threshold, k=None)
    return fitted.with_metadata(
        inference_activation=f"JumpReLU, thresholds fitted to an L0 of {l0:g} on {len(rows):,} tokens"
    )


def stand_in(coder: SparseCoder) -> SAE[Any]:
    """A stock object with the coder's metadata, also where SAELens has no class for the coder itself."""
    return build(coder.with_tensors(threshold=torch.zeros_like(coder.b_enc), k=None))


@torch.no_grad()
def hook_rows(
    coder: SparseCoder,
    model: Any,
    dataset: Any,
    n_tokens: int,
    *,
    hooks: list[str] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """What hooks give on a text, special tokens left out, a few prompts at a time.

    Args:
        coder: Its metadata say how the text is read.
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        dataset: As `sm.evaluate` takes it.
        n_tokens: About how many tokens.
        hooks: The hooks; None: the coder's own.

    Yields:
        Rows `[n, d]` of every hook.

    Raises:
        ValueError: the model has no such hook, or the dataset no tokens.
    """
    names = hooks or [coder.metadata["hook_name"]]
    for name in names:
        if name.endswith(".mlp.hook_in") and name not in hook_names(model):
            raise FormatError(
                f"hook_name={name!r}: a {type(model).__name__} has no hook behind the norm's gain. Move the "
                "transcoder to the tensor before it, with --frame normalized (formats.frames.to_frame)."
            )
        check_hook(model, name, "hook_name")
    sae = stand_in(coder)
    context_size: int = sae.cfg.metadata.context_size
    limit = getattr(getattr(model, "cfg", None), "n_ctx", None)
    context_size = min(context_size, limit or context_size)
    excluded = special_token_ids(model, True)
    with in_eval_mode(model):
        for tokens in token_batches(sae, model, dataset, n_tokens, context_size, 8):
            seen = hook_activations(model, tokens, names)
            if hooks is None:
                require_width(names[0], seen[names[0]], coder.d_in, "d_in")
            keep = ~is_excluded(tokens, excluded)
            yield {name: seen[name].flatten(2)[keep.to(seen[name].device)].cpu() for name in names}


def calibrate(
    coder: SparseCoder, model: Any, dataset: Any, l0: float | None = None, n_tokens: int = 16_384
) -> SparseCoder:
    """Thresholds fitted on what the coder's hook gives on a text.

    Args:
        coder: The coder.
        model: The language model it was trained on.
        dataset: As `sm.evaluate` takes it.
        l0: Wanted mean number of active latents; None: the coder's k, or that of its training.
        n_tokens: About how many tokens to fit on.

    Raises:
        FormatError: there is no k, and l0 is not given.
        ValueError: the model has no such hook, or the dataset no tokens.
    """
    l0 = (coder.k or coder.trained_k) if l0 is None else l0
    if l0 is None:
        raise FormatError("This model does not say its k: give the wanted number of active latents (--l0).")
    hook = coder.metadata["hook_name"]
    rows = torch.cat([batch[hook] for batch in hook_rows(coder, model, dataset, n_tokens)])
    return fit_threshold(coder, rows, l0)


def keep_topk(coder: SparseCoder, k: int) -> SparseCoder:
    """The TopK coder of the same weights, which is another function than one with thresholds.

    Raises:
        FormatError: k is not in 1 .. d_sae.
    """
    if not isinstance(k, int) or not 0 < k <= coder.d_sae:
        raise FormatError(f"k={k!r} must be in 1 .. d_sae={coder.d_sae}, an integer.")
    return coder.with_tensors(threshold=None, k=k).with_metadata(
        inference_activation=f"TopK with k={k}, in place of what it was trained with"
    )
