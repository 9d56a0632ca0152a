"""What a language model's hooks give on a batch of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Within, all of a language model is in eval mode; afterwards, each module in the mode it was in.

    A model may hold one in another mode: `HookedProxyLM` is in training mode, the one it runs is not, and
    would drop out from then on.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


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


def require_width(hook_name: str, activation: torch.Tensor, width: int, field: str) -> None:
    """Check that a hook gives vectors of the width that an SAE was made for.

    Args:
        hook_name: The hook.
        activation: `[prompts, context_size, ...]`, heads apart or not.
        width: What the SAE reads or predicts.
        field: The name of that width: "d_in" or "d_out".

    Raises:
        ValueError: it does not, so that the language model is another one than in training.
    """
    actual = activation[0, 0].numel()
    if actual != width:
        raise ValueError(
            f"{field}={width}, but hook {hook_name!r} of this language model gives {actual} values per "
            "token: it is not the model that this was trained on. Name that one with --model (model=)."
        )
