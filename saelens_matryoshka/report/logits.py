"""Which tokens a latent's decoder direction makes likelier, read off the unembedding.

A direction `v` in the residual stream changes the logits by about `(v - mean(v)) * gain @ W_U`, times a
positive number that depends on the token it is read at: the final norm divides by the length of the residual.
A LayerNorm takes the mean away, an RMSNorm does not; the gain is 1 where it was folded into `W_U`. The layers
in between are left out, and so is a soft cap, which changes no order. (nostalgebraist's "logit lens"; Dar et
al., 2022, https://arxiv.org/abs/2209.02535.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import nn

from saelens_matryoshka.sites import RESIDUAL_SITES, block_hook, find_site, hf_norm_gain, norm_gain

_CHUNK_VALUES = 1 << 26
_RESIDUAL = re.compile(rf"blocks\.\d+\.hook_({'|'.join(RESIDUAL_SITES)})")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_HISTOGRAM_BINS = 50


@dataclass(frozen=True)
class LogitEffects:
    """The tokens each latent raises and lowers most; values up to the final norm's scale."""

    top_tokens: torch.Tensor
    """`[d_sae, n]`, strongest first"""
    top_values: torch.Tensor
    """`[d_sae, n]`"""
    bottom_tokens: torch.Tensor
    """`[d_sae, n]`, most negative first"""
    bottom_values: torch.Tensor
    """`[d_sae, n]`"""
    low: torch.Tensor
    """`[d_sae]` smallest value over the vocabulary: the histogram's lower end"""
    high: torch.Tensor
    """`[d_sae]` largest"""
    histogram: torch.Tensor
    """`[d_sae, n_bins]` tokens of the vocabulary by value, in equal bins from low to high"""


@torch.no_grad()
def logit_effects(sae: SAE[Any], model: Any, n: int = 10) -> LogitEffects:
    """Top and bottom logits of every latent.

    Args:
        sae: SAE or transcoder; what counts is the space it writes to.
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        n: How many tokens each.

    Raises:
        ValueError: what the latents write to is not read by the unembedding, or the model has none.
    """
    directions = _in_the_residual(sae, model)
    W_U, gain, centred = _unembedding(model)
    dtype = torch.promote_types(W_U.dtype, torch.float32) if W_U.device.type == "cpu" else W_U.dtype
    W_U = W_U.to(dtype)
    if directions.shape[1] != W_U.shape[0]:
        raise ValueError(
            f"the latents write {directions.shape[1]} dimensions, and the unembedding reads {W_U.shape[0]}."
        )
    n = min(n, W_U.shape[1])
    parts = []
    for rows in directions.split(max(1, _CHUNK_VALUES // W_U.shape[1])):
        rows = rows.to(W_U.device, torch.float32)
        if centred:
            rows = rows - rows.mean(dim=1, keepdim=True)
        if gain is not None:
            rows = rows * gain.to(rows)
        logits = (rows.to(dtype) @ W_U).float()
        top, bottom = logits.topk(n), logits.topk(n, largest=False)
        low, high = logits.aminmax(dim=1)
        width = (high - low).clamp(min=1e-12)[:, None]
        bins = ((logits - low[:, None]) / width * _HISTOGRAM_BINS).long().clamp_(0, _HISTOGRAM_BINS - 1)
        histogram = torch.zeros(len(rows), _HISTOGRAM_BINS, device=rows.device)
        histogram.scatter_add_(1, bins, torch.ones_like(logits))
        part = (top.indices, top.values, bottom.indices, bottom.values, low, high, histogram.long())
        parts.append([tensor.cpu() for tensor in part])
    return LogitEffects(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _in_the_residual(sae: SAE[Any], model: Any) -> torch.Tensor:
    """What each latent adds to the residual stream, `[d_sae, d_model]`."""
    metadata = sae.cfg.metadata
    hook = metadata.hook_name_out or metadata.hook_name
    if _writes_to_the_residual(model, hook):
        return sae.W_dec
    block = block_hook(hook)
    cfg = getattr(model, "cfg", None)
    if block and block[1] == "attn.hook_z" and not getattr(cfg, "use_normalization_before_and_after", False):
        W_O = model.blocks[block[0]].attn.W_O
        head = metadata.hook_head_index
        W_O = W_O.flatten(0, 1) if head is None else W_O[head]
        return sae.W_dec.to(W_O) @ W_O
    raise ValueError(f"{hook!r} is not added to the residual stream, so its directions have no logits.")


def _writes_to_the_residual(model: Any, hook: str) -> bool:
    if _RESIDUAL.fullmatch(hook):
        return True
    layer = extract_layer_from_tlens_hook_name(hook)
    for name in RESIDUAL_SITES:
        try:
            if layer is not None and find_site(model, layer, name).hook_name == hook:
                return True
        except ValueError:
            continue
    return False


def _unembedding(model: Any) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """`W_U` `[d_model, d_vocab]`, the final norm's gain where it is not folded, and whether it centres."""
    if isinstance(model, HookedProxyLM):
        return _unembedding_of_hf(model.model)
    try:
        gain = norm_gain(model, "ln_final.hook_normalized").gain
    except ValueError:  # folded, or no norm
        gain = None
    return model.W_U, gain, str(getattr(model.cfg, "normalization_type", "")).startswith("LN")


def _unembedding_of_hf(hf: Any) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    head, base = hf.get_output_embeddings(), hf.base_model
    decoder = getattr(base, "decoder", base)
    norm = next((found for name in _FINAL_NORMS if (found := getattr(decoder, name, None)) is not None), None)
    if head is None or norm is None:
        raise ValueError(
            f"a {type(hf).__name__} has no unembedding or final norm under a name that is known."
        )
    return head.weight.T, hf_norm_gain(norm).gain, isinstance(norm, nn.LayerNorm)
