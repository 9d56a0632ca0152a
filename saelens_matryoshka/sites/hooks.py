"""The hooks of a language model: which there are, which fire, and what they give."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM, get_hook_fn
from torch import nn
from transformer_lens.hook_points import HookPoint

from saelens_matryoshka.seams import token_device

# Hook points which every block has, and which fire only while a field of the config is on.
_GATED_HOOKS = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_result": "use_attn_result",
}


def hook_names(model: Any) -> list[str]:
    """Every hook that can be read on this model.

    Hook points which do not fire as the model is configured are left out. For a HookedProxyLM
    these are its modules, whether or not it was made to instrument them.
    """
    model = uncompiled(model)
    if not isinstance(model, HookedProxyLM):
        return [name for name in model.hook_dict if _switched_off(model, name) is None]
    modules = uncompiled(model.model).named_modules()
    # A container such as a ModuleList has no forward, so a hook on it would not fire.
    return [name for name, m in modules if name and type(m).forward is not nn.Module.forward]


def block_hook(hook_name: str | None) -> tuple[int, str] | None:
    """Layer and hook of TransformerLens's "blocks.LAYER.HOOK", None for any other name.

    (`sae_lens.util.extract_layer_from_tlens_hook_name` gives the layer of an HF module too.)
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name or "")
    return (int(match[1]), match[2]) if match else None


def check_hook(model: Any, hook_name: str, field: str) -> None:
    """Check that a hook exists and fires, and warn if SAEs are attached to the model at other hooks.

    Args:
        model: any model with TransformerLens hooks.
        hook_name: the hook.
        field: the configuration field where the hook was given, for the message.

    Raises:
        ValueError: naming the field, the value and the hooks with a similar name.
    """
    model = uncompiled(model)
    if not hasattr(model, "hook_dict"):
        raise ValueError(
            f"model is a {type(model).__name__}, which has no hooks: give a HookedTransformer, "
            "TransformerBridge or HookedProxyLM"
        )
    known = hook_names(model)
    if hook_name in known:
        _warn_of_attached_saes(model)
        return
    if hook_name in model.hook_dict and (switch := _switched_off(model, hook_name)):
        raise ValueError(
            f"{field}={hook_name!r} does not fire while the model's {switch} is off: "
            f"call model.set_{switch}(True), or take another hook"
        )
    if f"{hook_name}.hook_sae_output" in known:
        raise ValueError(f"{field}={hook_name!r} has an SAE attached to it: call model.reset_saes() first")
    example = known[len(known) // 2]
    near = did_you_mean(hook_name, known) or f"; its hooks have names like {example!r}"
    raise ValueError(f"{field}={hook_name!r} is not a hook of this {type(model).__name__}{near}")


def _warn_of_attached_saes(model: Any) -> None:
    if attached := list(getattr(model, "acts_to_saes", {})):
        warnings.warn(
            f"model has an SAE attached at {' and '.join(map(repr, attached))}: its activations and "
            "predictions are those with it. Call model.reset_saes() first if that is not what you want.",
            stacklevel=3,
        )


def make_readable(model: Any, hook_name: str) -> None:
    """Give a module of a HookedProxyLM a hook point, if it was made without one. Others have theirs."""
    if not isinstance(model, HookedProxyLM) or hook_name in model.hook_dict:
        return
    module = model.model.get_submodule(hook_name)
    hook_point = HookPoint()
    hook_point.name = hook_name
    module.register_forward_hook(get_hook_fn(hook_point))
    model.hook_dict[hook_name] = model.mod_dict[hook_name] = hook_point
    model.named_modules_dict[hook_name] = module


@torch.no_grad()
def probe(model: Any, hook_names: Iterable[str]) -> dict[str, torch.Tensor]:
    """What hooks give on two tokens, `[1, 2, ...]` in float32 on the CPU, in the order in which they fire."""
    seen: dict[str, torch.Tensor] = {}

    def look(name: str, activation: torch.Tensor, hook: HookPoint) -> None:  # noqa: ARG001
        seen.setdefault(name, activation.detach().float().cpu())

    tokens = torch.zeros((1, 2), dtype=torch.long, device=token_device(model))
    hooks = [(name, partial(look, name)) for name in dict.fromkeys(hook_names)]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    return seen


def uncompiled(model: Any) -> Any:
    """A language model, SAE or transcoder out of torch.compile's wrapper, if it is in one."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """The names most like one that is not known, as the end of a message; "" if none is like it."""
    near = difflib.get_close_matches(value, known, n=4)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _switched_off(model: Any, hook_name: str) -> str | None:
    """The config field which is off and keeps the hook from firing."""
    switch = _GATED_HOOKS.get(hook_name.rpartition(".")[2])
    is_off = switch is not None and not getattr(getattr(model, "cfg", None), switch, False)
    return switch if is_off else None
