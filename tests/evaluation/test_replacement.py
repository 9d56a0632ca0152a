"""Logits with a hook's activation replaced, and what is computed for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saelens_matryoshka.evaluation.replacement import Replacement
from tests import tiny_models
from tests.tiny_models import VOCAB

HOOKS = [
    "hook_embed",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.ln2.hook_normalized",
    "blocks.1.hook_resid_post",
    "ln_final.hook_normalized",
]


def _doubled(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
    return 2 * activation


def _logits(model: Any, hook: str, **model_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As found, and of the whole model."""
    tokens = torch.randint(1, VOCAB, (3, 8))
    tokens[0, :3] = 0  # a tokenizer that pads on the left masks these
    replacement = Replacement(model, hook, model_kwargs)
    _, seen = model.run_with_cache(tokens, names_filter=replacement.hooks, **model_kwargs)
    whole = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(hook, _doubled)], **model_kwargs)
    return replacement.logits(tokens, seen, _doubled), whole


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("hf", [tiny_models.gpt2_hf, tiny_models.gemma2_hf, tiny_models.neox_hf])
def test_the_logits_are_those_of_the_whole_model_to_the_last_bit(hf: Any, padding_side: str) -> None:
    model = tiny_models.hooked_transformer(hf())
    model.set_tokenizer(tiny_models.tokenizer(), default_padding_side=padding_side)
    for hook in HOOKS:
        found, whole = _logits(model, hook)
        assert torch.equal(found, whole), hook
        assert not torch.equal(found, _logits(model, "blocks.1.hook_mlp_out")[0])


@pytest.mark.parametrize("load", [tiny_models.bridge, tiny_models.proxy])
def test_a_model_that_cannot_start_in_the_middle_is_run_whole(load: Any) -> None:
    model = load(tiny_models.gpt2_hf())
    hook = "transformer.h.1.mlp" if load is tiny_models.proxy else "blocks.1.hook_mlp_out"
    assert torch.equal(*_logits(model, hook))


def test_the_layers_before_the_hook_are_not_run_again() -> None:
    model = tiny_models.hooked_transformer(tiny_models.gpt2_hf())
    runs: list[int] = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
    last = len(model.blocks) - 1
    _logits(model, f"blocks.{last}.hook_mlp_out")
    assert runs == [*range(last + 1), *range(last + 1), last]


def test_with_arguments_of_the_models_own_all_of_it_is_run() -> None:
    model = tiny_models.hooked_transformer(tiny_models.gpt2_hf())
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[:, 0] = 0
    found, whole = _logits(model, "blocks.1.hook_mlp_out", attention_mask=mask)
    assert torch.equal(found, whole)
