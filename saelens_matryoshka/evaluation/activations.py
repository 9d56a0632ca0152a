"""What a language model's hooks give on a batch of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name


def hook_activations(
    model: Any, tokens: torch.Tensor, names: Sequence[str], model_kwargs: Mapping[str, Any] | None = None
) -> Mapping[str, torch.Tensor]:
    """Activations of some hooks, from a pass that ends with the last layer among them.

    Without the layers behind it, and without logits, which for a large vocabulary take most of the memory.

    Args:
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: `[prompts, context_size]`.
        names: The hooks.
        model_kwargs: Passed on to the model.

    Returns:
        By name, `[prompts, context_size, ...]`.
    """
    stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in names]
    known = [stop for stop in stops if stop is not None]
    _, cache = model.run_with_cache(
        tokens,
        names_filter=list(names),
        stop_at_layer=max(known) if len(known) == len(stops) else None,
        **(model_kwargs or {}),
    )
    return cache
