"""Which tensor is "mlp_in", and the other sites, on each kind of language model.

A transcoder reads the MLP's *true input*, the vector which the MLP's weights multiply, and
writes *what the block adds to the residual stream*. The same hook name is not the same tensor on
the three kinds of model which SAELens trains on, and some names that look right are not:

| tensor | HookedTransformer | TransformerBridge | HookedProxyLM (HF modules) |
|---|---|---|---|
| residual before the norm | `hook_resid_mid`, and `hook_mlp_in` | `hook_resid_mid` | none |
| normalised, before the gain | `ln2.hook_normalized` | `ln2.hook_normalized` | none |
| the MLP's true input | `ln2.hook_normalized * ln2.w + ln2.b` | `mlp.hook_in` | the norm before the MLP |
| what the block adds | `hook_mlp_out` | `hook_mlp_out` | the norm after the MLP, or the MLP |

A HookedTransformer has no hook after the norm's gain, so a site is a hook *and* the gain and
offset which turn its activation into the tensor meant. A HookedTransformer with folded norms has
no gain: there `ln2.hook_normalized` is what the MLP reads, in another coordinate frame, which
`norm_frame` names. On HF models the structure is read from the modules (the decoder layers, and
which of a layer's norms stands where), never from the model's name, and what is not recognised is
refused: a plausible wrong tensor trains without complaint.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

try:
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
except ImportError:  # releases of transformer-lens 3 which have no such list
    POST_NORM_ARCHITECTURES = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}

SITE_NAMES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_in",
    "mlp_out",
    "ln2_normalized",
)

_NO_MLP = "its blocks have no MLP (attn_only)"
_PARALLEL = "attention and MLP read the same residual in parallel, so there is no residual between"
_POST_NORM = "the MLP reads the residual itself; the block's norms act on what it adds"

# Hook points which exist in every block but fire only when a field of the model's config is on.
_GATED_HOOKS = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_result": "use_attn_result",
}


@dataclass(frozen=True)
class Site:
    """A tensor of a language model: the activation at a hook, times `gain` plus `offset`.

    Attributes:
        hook_name: the hook, as `run_with_cache(names_filter=[hook_name])` wants it.
        gain: [d], or None for 1.
        offset: [d], or None for 0.
    """

    hook_name: str
    gain: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """The site's tensor [..., d] from the activation [..., d] at `hook_name`.

        Computed in float32 or wider, returned in the activation's dtype.
        """
        if self.gain is None and self.offset is None:
            return activation
        wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
        if self.gain is not None:
            wide = wide * self.gain.to(wide)
        if self.offset is not None:
            wide = wide + self.offset.to(wide)
        return wide.to(activation.dtype)


class NormGain(NamedTuple):
    """What a norm does after normalising: times `gain` [d], plus `offset` [d] where it has one."""

    gain: torch.Tensor
    offset: torch.Tensor | None


def find_site(model: Any, layer: int, name: str) -> Site:
    """The hook, and the gain and offset if any, which give a named tensor of one layer.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM; torch.compile'd too.
        layer: from 0.
        name: one of SITE_NAMES. "mlp_in" is the MLP's true input; "mlp_out" and "attn_out" are
            what is added to the residual stream, after a post-norm where there is one;
            "ln2_normalized" is the MLP's input before the norm's gain.

    Raises:
        ValueError: an unknown name, a layer out of range, a kind of model or a structure that is
            not recognised, or a tensor which this kind of model has no hook for.
    """
    model = _unwrap(model)
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
        sites = _hf_sites(_unwrap(model.model), layer)
    else:
        raise ValueError(
            f"model is a {type(model).__name__}; find_site knows HookedTransformer, "
            "TransformerBridge and HookedProxyLM"
        )
    site = sites[name]
    if isinstance(site, str):
        present = [other for other, found in sites.items() if isinstance(found, Site)]
        raise ValueError(
            f"name={name!r} has no hook at layer={layer} of this {type(model).__name__}: {site}. "
            f"The sites it has there are {', '.join(present)}"
        )
    return site


def norm_gain(model: Any, hook_name: str) -> NormGain:
    """The gain and offset of the norm whose `hook_normalized` a hook is.

    Raises:
        ValueError: the hook does not exist or is not a norm's `hook_normalized`, or the norm has
            no weight because it was folded into the next layer.
    """
    model = _unwrap(model)
    norm = _norm_of(model, hook_name)
    needs = "input_gain='norm_weight' needs hook_name to be a norm's hook_normalized"
    if norm is None:
        what = (
            "this model's hooks are module outputs, where a norm's gain is already in: "
            if isinstance(model, HookedProxyLM)
            else "take find_site(model, layer, 'ln2_normalized').hook_name, or "
        )
        raise ValueError(f"{needs}, but it is {hook_name!r}: {what}set input_gain='none'")
    gain = _gain_of(model, norm)
    if gain is None:
        raise ValueError(
            f"{needs} with its weight, but at hook_name={hook_name!r} the norm's weight was "
            "folded into the next layer: load the model with no processing "
            "(from_pretrained_no_processing / fold_ln=False), or set input_gain='none'"
        )
    return gain


def norm_frame(model: Any, hook_name: str) -> str:
    """The coordinate frame of a hook's tensor.

    Returns:
        "raw" for a hook which is not a norm's `hook_normalized`, "normalized" for one of a norm
        with its weight, "normalized_folded" where that weight was folded into the next layer.

    Raises:
        ValueError: a `hook_normalized` which the model does not have.
    """
    model = _unwrap(model)
    norm = _norm_of(model, hook_name)
    if norm is None:
        return "raw"
    return "normalized_folded" if _gain_of(model, norm) is None else "normalized"


def hook_names(model: Any) -> list[str]:
    """Every hook that can be read on this model.

    Hook points which never fire as the model is configured are left out. For a HookedProxyLM
    these are all the modules that are called, whichever of them it was made to instrument.
    """
    model = _unwrap(model)
    if isinstance(model, HookedProxyLM):
        modules = _unwrap(model.model).named_modules()
        # A container such as ModuleList has no forward, so a hook on it never fires.
        return [
            name
            for name, module in modules
            if name and type(module).forward is not nn.Module.forward
        ]
    return [name for name in model.hook_dict if _gate(model, name) is None]


def check_hook(model: Any, hook_name: str, field: str) -> None:
    """Check that a hook exists and fires.

    Args:
        model: any model with TransformerLens hooks.
        hook_name: the hook.
        field: the configuration field which the hook comes from, for the message.

    Raises:
        ValueError: naming the field, the value and the hooks with a similar name.
    """
    model = _unwrap(model)
    known = hook_names(model)
    if hook_name in known:
        return
    gate = None if isinstance(model, HookedProxyLM) else _gate(model, hook_name)
    if gate is not None and hook_name in model.hook_dict:
        raise ValueError(
            f"{field}={hook_name!r} never fires while the model's {gate} is off: "
            f"call model.set_{gate}(True), or take another hook"
        )
    near = _did_you_mean(hook_name, known) or f"; its hooks are such as {known[-1]!r}"
    raise ValueError(f"{field}={hook_name!r} is not a hook of this {type(model).__name__}{near}")


def _unwrap(model: Any) -> Any:
    """The module inside torch.compile's wrapper, if it is in one."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def _did_you_mean(value: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, known, n=4)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _check_layer(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"layer={layer}, but the model has {n_layers} layers (0 to {n_layers - 1})"
        )


def _gate(model: Any, hook_name: str) -> str | None:
    """The config field which has to be on, and is not, for the hook to fire."""
    gate = _GATED_HOOKS.get(hook_name.rpartition(".")[2])
    return gate if gate is not None and not getattr(model.cfg, gate, False) else None


def _norm_of(model: Any, hook_name: str) -> nn.Module | None:
    """The norm whose hook_normalized this is; None for any other hook."""
    path, _, leaf = hook_name.rpartition(".")
    if leaf != "hook_normalized" or isinstance(model, HookedProxyLM):
        return None
    check_hook(model, hook_name, "hook_name")
    return model.get_submodule(path)


def _gain_of(model: Any, norm: Any) -> NormGain | None:
    """A norm's gain and offset; None for a norm without a weight of its own."""
    if not isinstance(model, TransformerBridge):
        gain, offset = getattr(norm, "w", None), getattr(norm, "b", None)
        return None if gain is None else NormGain(*_copies(gain, offset))
    hf_norm = norm.original_component
    weight, offset = getattr(hf_norm, "weight", None), getattr(hf_norm, "bias", None)
    if weight is None:
        return None
    gain = weight.float() if _multiplies_by(hf_norm, weight, offset) else 1.0 + weight.float()
    # A bridge keeps its norm modules when it folds their weights away (compatibility mode), and
    # leaves them doing nothing.
    idle = bool((gain == 1).all()) and (offset is None or not bool(offset.any()))
    return None if idle and model.compatibility_mode else NormGain(*_copies(gain, offset))


@torch.no_grad()
def _multiplies_by(norm: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether an HF norm multiplies by its weight, and not by 1 + its weight as Gemma's do.

    Seen from what the norm does to a vector of mean 0 and RMS 1, as no attribute says it on
    every architecture.
    """
    signs = torch.ones_like(weight)
    signs[1::2] = -1
    out = norm(signs) if bias is None else norm(signs) - bias
    measured = (out * signs).float()
    distance = [(measured - gain).abs().sum() for gain in (weight, 1 + weight)]
    return bool(distance[0] <= distance[1])


def _copies(
    gain: torch.Tensor, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies which neither carry gradients nor follow later changes of the model."""
    return gain.detach().clone(), None if offset is None else offset.detach().clone()


def _hooked_transformer_sites(model: HookedTransformer, layer: int) -> dict[str, Site | str]:
    """Each site, or why a HookedTransformer has no hook for it."""
    cfg = model.cfg
    _check_layer(layer, cfg.n_layers)
    block = f"blocks.{layer}."
    sites: dict[str, Site | str] = {
        name: Site(f"{block}hook_{name}")
        for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    }
    if cfg.attn_only:
        return sites | dict.fromkeys(("resid_mid", "mlp_in", "mlp_out", "ln2_normalized"), _NO_MLP)
    mlp_reads = Site(f"{block}hook_resid_{'pre' if cfg.parallel_attn_mlp else 'mid'}")
    if cfg.parallel_attn_mlp:
        sites["resid_mid"] = _PARALLEL
    if cfg.original_architecture in POST_NORM_ARCHITECTURES:
        return sites | {"mlp_in": mlp_reads, "ln2_normalized": _POST_NORM}
    if cfg.normalization_type is None:
        return sites | {"mlp_in": mlp_reads, "ln2_normalized": "the model has no norms"}
    normalized = f"{block}ln2.hook_normalized"
    gain = _gain_of(model, model.get_submodule(f"{block}ln2"))
    mlp_in = Site(normalized) if gain is None else Site(normalized, gain.gain, gain.offset)
    return sites | {"mlp_in": mlp_in, "ln2_normalized": Site(normalized)}


def _bridge_sites(model: TransformerBridge, layer: int) -> dict[str, Site | str]:
    """Each site, or why a TransformerBridge has no hook for it.

    The bridge's aliases (hook_resid_mid, hook_mlp_out and so on) follow its architecture: behind
    a post-norm, absent where blocks are parallel. Unlike hook_mlp_in they fire by default.
    """
    blocks: Any = getattr(model, "blocks", ())
    _check_layer(layer, len(blocks))
    block, path = blocks[layer], f"blocks.{layer}."
    fires = set(hook_names(model))
    mlp = getattr(block, "mlp", None)
    # Where the HF layer holds the MLP's two matrices itself (OPT), the bridge's mlp is never
    # called, and the first matrix is what receives the input.
    mlp_in = "mlp.hook_in" if mlp is None or mlp.name is not None else "mlp.in.hook_in"
    hooks = {
        "resid_pre": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
        "resid_post": "hook_resid_post",
        "attn_out": "hook_attn_out",
        "mlp_in": mlp_in,
        "mlp_out": "hook_mlp_out",
        "ln2_normalized": "ln2.hook_normalized",
    }
    sites: dict[str, Site | str] = {
        name: Site(path + hook) if path + hook in fires else f"it has no {path + hook}"
        for name, hook in hooks.items()
    }
    if getattr(block, "mlp_reads_resid_directly", False):
        sites["ln2_normalized"] = _POST_NORM
    return sites


class _Layout(NamedTuple):
    """Which norms of an HF decoder layer stand around its sub-layers, None for none."""

    before_mlp: str | None
    after_attn: str | None = None
    after_mlp: str | None = None


# By the names of all the norms of a layer, since one name means different things in different
# company: post_attention_layernorm feeds the MLP in Llama and follows attention in Gemma-2.
_LAYOUTS = {
    frozenset({"ln_1", "ln_2"}): _Layout("ln_2"),
    frozenset({"input_layernorm", "post_attention_layernorm"}): _Layout("post_attention_layernorm"),
    frozenset(
        {
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        }
    ): _Layout(
        "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
    ),
    frozenset({"post_attention_layernorm", "post_feedforward_layernorm"}): _Layout(
        None, "post_attention_layernorm", "post_feedforward_layernorm"
    ),
    # One norm for both sub-layers, which run in parallel.
    frozenset({"ln_1"}): _Layout("ln_1"),
    frozenset({"input_layernorm"}): _Layout("input_layernorm"),
}
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES = ("mlp", "block_sparse_moe", "feed_forward")
_RESCALES = ("residual_multiplier", "layer_scalar")


def _hf_sites(hf: nn.Module, layer: int) -> dict[str, Site | str]:
    """Each site, or why no module of an HF model puts it out."""
    path, layers = _decoder_layers(hf)
    _check_layer(layer, len(layers))
    block = layers[layer]
    prefix = f"{path}.{layer}."
    layout = _LAYOUTS.get(_norm_names(block))
    attention, mlp = _child(block, _ATTENTION_NAMES), _child(block, _MLP_NAMES)
    if layout is None or mlp is None:
        raise ValueError(
            f"layer={layer} ({path}.{layer}) of this HookedProxyLM has a structure which is not "
            f"recognised. Its modules are {_children(block)}"
        )
    rescales = [name for name in _RESCALES if hasattr(block, name)]
    if "residual" in inspect.signature(getattr(block, mlp).forward).parameters:
        rescales.append(f"{mlp}.forward(residual)")
    added = {"attn_out": layout.after_attn or attention, "mlp_out": layout.after_mlp or mlp}
    sites: dict[str, Site | str] = {"resid_post": Site(f"{path}.{layer}")}
    sites["resid_pre"] = Site(f"{path}.{layer - 1}") if layer else _embedding(hf, path)
    for name, module in added.items():
        if rescales:
            sites[name] = f"no module puts out what is added to the residual ({rescales[0]})"
        else:
            sites[name] = Site(prefix + module) if module else f"of {_children(block)} none is it"
    sites["mlp_in"] = Site(prefix + layout.before_mlp) if layout.before_mlp else _POST_NORM
    only_outputs = "a HookedProxyLM reads the outputs of modules, and none puts it out"
    return sites | dict.fromkeys(("resid_mid", "ln2_normalized"), only_outputs)


def _decoder_layers(hf: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of an HF model's decoder layers."""
    lists = {n: m for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    known = {
        name: layers
        for name, layers in lists.items()
        if any(_norm_names(layer) in _LAYOUTS and _child(layer, _MLP_NAMES) for layer in layers)
    }
    if len(known) != 1:
        what = f"{len(known)} lists of decoder layers" if known else "no known decoder layers"
        listed = {name: _children(layers[0]) for name, layers in (known or lists).items()}
        raise ValueError(f"{type(hf).__name__} has {what}. Its lists of modules are {listed}")
    return next(iter(known.items()))


def _embedding(hf: nn.Module, layers_path: str) -> Site | str:
    """What puts out the residual stream before layer 0: the embeddings' dropout, or the only
    embedding where nothing is done to its output."""
    path = layers_path.rpartition(".")[0]
    decoder = hf.get_submodule(path)
    children = dict(decoder.named_children())
    dropouts = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
    embeddings = [name for name, child in children.items() if isinstance(child, nn.Embedding)]
    # Granite, and Gemma before transformers 5, scale the embeddings outside of their module.
    model_type = getattr(getattr(hf, "config", None), "model_type", "")
    scaled = hasattr(decoder, "embedding_multiplier") or (
        model_type.startswith("gemma") and type(children[embeddings[0]]) is nn.Embedding
    )
    if len(dropouts) == 1:
        return Site(f"{path}.{dropouts[0]}".lstrip("."))
    if len(embeddings) == 1 and len(_norm_names(decoder)) <= 1 and not scaled:
        return Site(f"{path}.{embeddings[0]}".lstrip("."))
    return (
        f"before layer 0 no module puts it out ({path} scales or adds to the output of "
        f"{', '.join(embeddings) or 'its embedding'})"
    )


def _norm_names(module: nn.Module) -> frozenset[str]:
    """The names of the norms that are direct children."""
    children = module.named_children()
    return frozenset(name for name, child in children if "norm" in type(child).__name__.lower())


def _child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of the names which is a direct child."""
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or type(module).__name__
