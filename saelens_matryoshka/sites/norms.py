"""What norms multiply by once they have normalised, and the frame of what comes out of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from saelens_matryoshka.sites.hooks import check_hook, uncompiled


class NormGain(NamedTuple):
    """What a norm does once it has normalised: times `gain` [d], plus `offset` [d] if any."""

    gain: torch.Tensor
    offset: torch.Tensor | None


def norm_gain(model: Any, hook_name: str) -> NormGain:
    """The gain and offset of the norm whose `hook_normalized` a hook is.

    Raises:
        ValueError: the hook does not exist or is not a norm's `hook_normalized`, or the norm has
            no weight because it was folded into the next layer.
    """
    model = uncompiled(model)
    norm = _norm_of(model, hook_name)
    needs = "input_gain='norm_weight' needs hook_name to be a norm's hook_normalized"
    if norm is None:
        instead = "take find_site(model, layer, 'ln2_normalized').hook_name, or "
        if isinstance(model, HookedProxyLM):
            instead = "a norm's output, which is what this model's hooks give, has its gain: "
        raise ValueError(f"{needs}, and it is {hook_name!r}: {instead}set input_gain='none'")
    gain = gain_of(model, norm)
    if gain is None:
        raise ValueError(
            f"{needs} with its weight, and at hook_name={hook_name!r} the norm's weight was "
            "folded into the next layer: load the model with no processing "
            "(from_pretrained_no_processing / fold_ln=False), or set input_gain='none'"
        )
    return gain


def norm_frame(model: Any, hook_name: str) -> str:
    """The coordinate frame of a hook's tensor.

    Returns:
        "raw" for a hook which is not a norm's `hook_normalized`, "normalized" for that of a norm
        with its weight, "normalized_folded" where the weight was folded into the next layer.

    Raises:
        ValueError: a `hook_normalized` which the model does not have.
    """
    model = uncompiled(model)
    norm = _norm_of(model, hook_name)
    if norm is None:
        return "raw"
    return "normalized_folded" if gain_of(model, norm) is None else "normalized"


@torch.no_grad()
def hf_norm_gain(norm: nn.Module) -> NormGain:
    """What a norm module of transformers multiplies by and adds, in float32; Gemma's 1 + weight included.

    Raises:
        ValueError: it has no weight.
    """
    weight, offset = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        raise ValueError(f"a {type(norm).__name__} has no weight.")
    return NormGain(weight.float() + _is_zero_centred(norm, weight, offset), offset)


def _norm_of(model: Any, hook_name: str) -> nn.Module | None:
    """The norm whose hook_normalized this is; None for any other hook."""
    path, _, leaf = hook_name.rpartition(".")
    if leaf != "hook_normalized" or isinstance(model, HookedProxyLM):
        return None
    check_hook(model, hook_name, "hook_name")
    return model.get_submodule(path)


@torch.no_grad()
def gain_of(model: Any, norm: Any) -> NormGain | None:
    """Copies of a norm's gain and offset; None for a norm without a weight of its own."""
    if isinstance(model, TransformerBridge):
        norm = norm.original_component
        gain, offset = getattr(norm, "weight", None), getattr(norm, "bias", None)
    else:
        gain, offset = getattr(norm, "w", None), getattr(norm, "b", None)
    if gain is None:
        return None
    if isinstance(model, TransformerBridge):
        gain = gain.float() + _is_zero_centred(norm, gain, offset)
        idle = bool((gain == 1).all()) and (offset is None or not bool(offset.any()))
        # In compatibility mode a bridge folds the weights away and leaves the norms idle.
        if idle and model.compatibility_mode:
            return None
    return NormGain(gain.clone(), None if offset is None else offset.clone())


def _is_zero_centred(norm: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether an HF norm multiplies by 1 + its weight, as Gemma's do, and not by its weight.

    Seen from what it does to a vector of mean 0 and RMS 1, since no attribute tells it of every
    architecture.
    """
    signs = torch.ones_like(weight)
    signs[1::2] = -1
    gain = (norm(signs) - (0 if bias is None else bias)) * signs
    return bool((gain - weight).abs().sum() > (gain - weight - 1).abs().sum())
