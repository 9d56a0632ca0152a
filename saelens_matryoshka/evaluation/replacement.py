"""The logits of a language model in which a hook's activation is replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sae_lens.util import extract_layer_from_tlens_hook_name
from transformer_lens import HookedTransformer


class Replacement:
    """Runs a language model again and again, with one hook's activation replaced.

    A HookedTransformer computes again only what the hook can change: the layers from the hook's own on, from
    what a pass without replacement gave them. That is the same logits, to the last bit.

    Args:
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        hook_name: What is replaced.
        model_kwargs: Passed on to the model. With any, the whole model is run: they may concern all layers.
    """

    def __init__(self, model: Any, hook_name: str, model_kwargs: Mapping[str, Any]) -> None:
        self._model, self._hook_name, self._model_kwargs = model, hook_name, model_kwargs
        self._layer = None
        if isinstance(model, HookedTransformer) and not model_kwargs:
            self._layer = extract_layer_from_tlens_hook_name(hook_name)

    @property
    def hooks(self) -> list[str]:
        """Whose activations, in a pass without replacement, `logits` needs."""
        return [] if self._layer is None else [f"blocks.{self._layer}.hook_resid_pre"]

    def logits(
        self, tokens: torch.Tensor, seen: Mapping[str, torch.Tensor], hook_fn: Callable[..., Any]
    ) -> torch.Tensor:
        """Logits `[prompts, context_size, d_vocab]`.

        Args:
            tokens: `[prompts, context_size]`.
            seen: Activations of `hooks` on these tokens.
            hook_fn: Called with the activation and `hook`; gives what takes its place.
        """
        replaced: dict[str, Any] = {"return_type": "logits", "fwd_hooks": [(self._hook_name, hook_fn)]}
        if self._layer is None:
            return self._model.run_with_hooks(tokens, **replaced, **self._model_kwargs)
        _, _, shortformer_pos_embed, attention_mask = self._model.input_to_embed(tokens)
        return self._model.run_with_hooks(
            seen[self.hooks[0]],
            start_at_layer=self._layer,
            shortformer_pos_embed=shortformer_pos_embed,
            attention_mask=attention_mask,
            **replaced,
        )
