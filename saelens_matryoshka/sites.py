"""Which tensor is "mlp_in", and the other sites, on each kind of language model.

A transcoder reads the MLP's *true input*, the vector which the MLP's weights multiply, and
writes *what the block adds to the residual stream*. One hook name is not one tensor on the three
kinds of model which SAELens trains on, and some names that look right are not:

| tensor | HookedTransformer | TransformerBridge | HookedProxyLM (HF modules) |
|---|---|---|---|
| residual before the norm | `hook_resid_mid`, `hook_mlp_in` | `hook_resid_mid` | none |
| normalised, before the gain | `ln2.hook_normalized` | `ln2.hook_normalized` | none |
| the MLP's true input | `ln2.hook_normalized * ln2.w + ln2.b` | `mlp.hook_in` | norm before MLP |
| what the block adds | `hook_mlp_out` | `hook_mlp_out` | norm after MLP, or MLP |

A HookedTransformer has no hook behind a norm's gain, so a site is a hook *and* the gain and offset
which make its activation the tensor that is meant. Where norms were folded there is no gain:
`ln2.hook_normalized` is then what the MLP reads, in another coordinate frame (`norm_frame`).
"""

from __future__ import annotations

import difflib
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from numbers import Integral
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from sae_lens.load_model import HookedProxyLM, get_hook_fn
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from saelens_matryoshka.seams import token_device

try:
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
except ImportError:  # a release of transformer-lens 3 without this list
    POST_NORM_ARCHITECTURES = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}

RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SITE_NAMES = (*RESIDUAL_SITES, "mlp_in", "ln2_normalized")

_NO_MLP = "its blocks have no MLP (attn_only)"
_PARALLEL = "attention and MLP read the same residual, so there is none between them"
_POST_NORM = "the MLP reads the residual itself, and the norms act on what the block adds"
# What has no hook in models whose norms act on what the block adds, by releases which hook it before them.
_BEFORE_POST_NORMS = {}
if Version(_TRANSFORMER_LENS := version("transformer-lens")) < Version("3.7.2"):
    _BEFORE_POST_NORMS = dict.fromkeys(
        ("attn_out", "mlp_out"),
        f"transformer-lens {_TRANSFORMER_LENS} hooks it before the norms: update to 3.7.2 or later",
    )

# Hook points which every block has, and which fire only while a field of the config is on.
_GATED_HOOKS = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_result": "use_attn_result",
}
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")


@dataclass(frozen=True, eq=False)
class Site:
    """A tensor of a language model: the activation at a hook, times `gain`, plus `offset`.

    Attributes:
        hook_name: the hook, as `run_with_cache(names_filter=[hook_name])` takes it.
        gain: [d], or None for 1.
        offset: [d], or None for 0.
    """

    hook_name: str
    gain: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        pairs = ((self.gain, other.gain), (self.offset, other.offset))
        return self.hook_name == other.hook_name and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash(self.hook_name)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """The site's tensor [..., d] from the activation [..., d] at `hook_name`.

        Computed in float32 or wider, and returned in the activation's dtype.
        """
        if self.gain is None and self.offset is None:
            return activation
        tensor = activation.to(torch.promote_types(activation.dtype, torch.float32))
        if self.gain is not None:
            tensor = tensor * self.gain.to(tensor)
        if self.offset is not None:
            tensor = tensor + self.offset.to(tensor)
        return tensor.to(activation.dtype)


class NormGain(NamedTuple):
    """What a norm does once it has normalised: times `gain` [d], plus `offset` [d] if any."""

    gain: torch.Tensor
    offset: torch.Tensor | None


def find_site(model: Any, layer: int, name: str) -> Site:
    """The hook, with the gain and offset if any, which give a named tensor of one layer.

    A HookedProxyLM is run on four tokens, to see which module puts out which tensor.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM, or one of them compiled.
        layer: from 0.
        name: one of SITE_NAMES. "mlp_in" is the MLP's true input; "mlp_out" and "attn_out" are
            what is added to the residual stream, behind a post-norm where there is one;
            "ln2_normalized" is "mlp_in" before the norm's gain.

    Raises:
        ValueError: an unknown name, a layer out of range, a kind of model or a structure which
            is not recognised, or a tensor which no hook of this model gives.
    """
    model = uncompiled(model)
    if name not in SITE_NAMES:
        raise ValueError(
            f"name={name!r} is not a known site{_did_you_mean(name, SITE_NAMES)}. "
            f"The known sites are {', '.join(SITE_NAMES)}"
        )
    if isinstance(model, HookedTransformer):
        sites = _hooked_transformer_sites(model, layer)
    elif isinstance(model, TransformerBridge):
        sites = _bridge_sites(model, layer)
    elif isinstance(model, HookedProxyLM):
        sites = _hf_sites(uncompiled(model.model), layer)
    else:
        raise ValueError(
            f"model is a {type(model).__name__}; find_site knows HookedTransformer, "
            "TransformerBridge and HookedProxyLM"
        )
    site = sites[name]
    if isinstance(site, str):
        present = ", ".join(other for other, found in sites.items() if isinstance(found, Site))
        raise ValueError(
            f"name={name!r} has no hook at layer={layer} of this {type(model).__name__}: {site}. "
            f"The sites it has there are {present}"
        )
    return site


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
    gain = _gain_of(model, norm)
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
    return "normalized_folded" if _gain_of(model, norm) is None else "normalized"


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
    near = _did_you_mean(hook_name, known) or f"; its hooks have names like {example!r}"
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


def _did_you_mean(value: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, known, n=4)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _check_layer(layer: int, n_layers: int) -> None:
    if isinstance(layer, bool) or not isinstance(layer, Integral):
        raise ValueError(f"layer={layer!r} must be an integer")
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer}, but the model has {n_layers} layers (0 to {n_layers - 1})")


def _switched_off(model: Any, hook_name: str) -> str | None:
    """The config field which is off and keeps the hook from firing."""
    switch = _GATED_HOOKS.get(hook_name.rpartition(".")[2])
    is_off = switch is not None and not getattr(getattr(model, "cfg", None), switch, False)
    return switch if is_off else None


def _norm_of(model: Any, hook_name: str) -> nn.Module | None:
    """The norm whose hook_normalized this is; None for any other hook."""
    path, _, leaf = hook_name.rpartition(".")
    if leaf != "hook_normalized" or isinstance(model, HookedProxyLM):
        return None
    check_hook(model, hook_name, "hook_name")
    return model.get_submodule(path)


@torch.no_grad()
def _gain_of(model: Any, norm: Any) -> NormGain | None:
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


def _is_zero_centred(norm: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether an HF norm multiplies by 1 + its weight, as Gemma's do, and not by its weight.

    Seen from what it does to a vector of mean 0 and RMS 1, since no attribute tells it of every
    architecture.
    """
    signs = torch.ones_like(weight)
    signs[1::2] = -1
    gain = (norm(signs) - (0 if bias is None else bias)) * signs
    return bool((gain - weight).abs().sum() > (gain - weight - 1).abs().sum())


def _hooked_transformer_sites(model: HookedTransformer, layer: int) -> dict[str, Site | str]:
    """Each site, or why no hook of a HookedTransformer gives it."""
    cfg = model.cfg
    _check_layer(layer, cfg.n_layers)
    block = f"blocks.{layer}."
    sites: dict[str, Site | str] = {name: Site(f"{block}hook_{name}") for name in RESIDUAL_SITES}
    if cfg.attn_only:
        return sites | dict.fromkeys(("resid_mid", "mlp_out", "mlp_in", "ln2_normalized"), _NO_MLP)
    residual = sites["resid_pre"] if cfg.parallel_attn_mlp else sites["resid_mid"]
    if cfg.parallel_attn_mlp:
        sites["resid_mid"] = _PARALLEL
    if cfg.original_architecture in POST_NORM_ARCHITECTURES:
        return sites | {"mlp_in": residual, "ln2_normalized": _POST_NORM} | _BEFORE_POST_NORMS
    if cfg.normalization_type is None:
        return sites | {"mlp_in": residual, "ln2_normalized": "the model has no norms"}
    normalized = f"{block}ln2.hook_normalized"
    gain = _gain_of(model, model.get_submodule(f"{block}ln2")) or ()
    return sites | {"mlp_in": Site(normalized, *gain), "ln2_normalized": Site(normalized)}


def _bridge_sites(model: TransformerBridge, layer: int) -> dict[str, Site | str]:
    """Each site, or why no hook of a TransformerBridge gives it.

    The bridge's names (hook_resid_mid, hook_mlp_out and so on) follow its architecture: behind a
    post-norm, absent where attention and MLP are parallel. Unlike hook_mlp_in they always fire.
    """
    blocks: Any = getattr(model, "blocks", ())
    _check_layer(layer, len(blocks))
    block = blocks[layer]
    hooks = {name: f"hook_{name}" for name in RESIDUAL_SITES}
    hooks |= {"mlp_in": "mlp.hook_in", "ln2_normalized": "ln2.hook_normalized"}
    # Where the HF layer itself holds the MLP's two matrices (OPT), the bridge's mlp is not
    # called, and the first matrix takes the input.
    if hasattr(block, "mlp") and block.mlp.name is None:
        hooks["mlp_in"] = "mlp.in.hook_in"
    exist = set(hook_names(model))
    sites: dict[str, Site | str] = {}
    for name, leaf in hooks.items():
        hook = f"blocks.{layer}.{leaf}"
        sites[name] = Site(hook) if hook in exist else f"there is no {hook}"
    reads_residual = getattr(block, "mlp_reads_resid_directly", False)  # a release before 3.7.2 does not say
    if reads_residual or model.cfg.architecture in POST_NORM_ARCHITECTURES:
        sites |= {"ln2_normalized": _POST_NORM} | _BEFORE_POST_NORMS
    return sites


class _Call(NamedTuple):
    """The first tensor which a module took, and the first which it gave."""

    input: torch.Tensor
    output: torch.Tensor


def _hf_sites(hf: nn.Module, layer: int) -> dict[str, Site | str]:
    """Each site, or why no module of an HF model puts it out.

    Names do not tell: what comes out of `post_attention_layernorm` feeds the MLP in Llama and is
    added to the residual in Gemma-2, and some models rescale between modules. So the modules are
    found by what they put out: the MLP's input, and the two tensors which make the layer's output
    when they are added to its input.
    """
    calls = _calls(hf)
    layers, n_layers = _decoder_layers(hf, calls)
    _check_layer(layer, n_layers)
    block = f"{layers}.{layer}"
    children = {name: call.output for name, call in calls.items() if _parent(name) == block}
    mlp = next((f"{block}.{name}" for name in _MLP_NAMES if f"{block}.{name}" in calls), None)
    if block not in calls or mlp is None:
        raise ValueError(
            f"layer={layer} ({block}) of this HookedProxyLM runs no module that is known as an "
            f"MLP ({', '.join(_MLP_NAMES)}); it runs {', '.join(children)}"
        )
    before, after = calls[block]
    sites: dict[str, Site | str] = dict.fromkeys(
        SITE_NAMES, f"no module puts it out (none of {', '.join(children)})"
    )
    sites["resid_post"] = Site(block)
    # Before layer 0 stand the decoder's embeddings, and in some models a dropout behind them.
    for name, call in calls.items():
        at_place = name == f"{layers}.{layer - 1}" if layer else _parent(name) == _parent(layers)
        if at_place and torch.equal(call.output, before):
            sites["resid_pre"] = Site(name)
    for name, output in children.items():
        if torch.equal(output, calls[mlp].input):
            sites["mlp_in"] = Site(name)
    # In the order of the calls: attention's part before the MLP's, and a sub-layer before a
    # dropout which repeats it.
    names = list(children)
    parts = [
        (attention, added)
        for added in names[names.index(mlp) :]
        for attention in names[: names.index(added)]
        if _adds_up(before, children[attention], children[added], after)
    ]
    if parts:
        sites["attn_out"], sites["mlp_out"] = map(Site, parts[0])
    return sites


@torch.no_grad()
def _calls(hf: nn.Module) -> dict[str, _Call]:
    """What each module that runs exactly once takes and gives on a few tokens, in order."""
    calls: dict[str, list[_Call | None]] = defaultdict(list)

    def record(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        # Of a tuple, HookedProxyLM reads the first element.
        given = output[0] if isinstance(output, tuple) and output else output
        taken = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if taken is None or not isinstance(given, torch.Tensor):
            calls[name].append(None)
        else:  # on one device, for models which are spread over several
            calls[name].append(_Call(taken.to("cpu", copy=True), given.to("cpu", copy=True)))

    modules = hf.named_modules()
    handles = [m.register_forward_hook(partial(record, n), with_kwargs=True) for n, m in modules]
    try:
        hf(torch.arange(2, 6, device=next(hf.parameters()).device)[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: runs[0] for name, runs in calls.items() if len(runs) == 1 and runs[0]}


def _decoder_layers(hf: nn.Module, calls: dict[str, _Call]) -> tuple[str, int]:
    """The path and the length of the list of decoder layers: the one whose MLPs run."""
    lists = {name: m for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    with_mlps = [
        name
        for name, layers in lists.items()
        if any(f"{name}.{i}.{mlp}" in calls for i in range(len(layers)) for mlp in _MLP_NAMES)
    ]
    if len(with_mlps) != 1:
        found = {name: [child for child, _ in m[0].named_children()] for name, m in lists.items()}
        raise ValueError(
            f"{len(with_mlps)} lists of modules of {type(hf).__name__}, and not 1, are known as "
            f"decoder layers. Its lists, with the modules of their first element, are {found}"
        )
    return with_mlps[0], len(lists[with_mlps[0]])


def _adds_up(before: torch.Tensor, a: torch.Tensor, b: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether before + a + b is after to the last bit, in one of the orders of adding.

    Not within a tolerance: beside a large residual a wrong tensor would be within it.
    """
    if not before.shape == a.shape == b.shape == after.shape:
        return False
    return any(torch.equal(x, after) for x in (before + a + b, a + b + before, before + b + a))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
