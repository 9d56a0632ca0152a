"""The hook of a named tensor, on each kind of model."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from saelens_matryoshka.sites.hf import hf_sites
from saelens_matryoshka.sites.hooks import did_you_mean, hook_names, uncompiled
from saelens_matryoshka.sites.norms import gain_of
from saelens_matryoshka.sites.site import RESIDUAL_SITES, SITE_NAMES, Site, check_layer

try:
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
except ImportError:  # a release of transformer-lens 3 without this list
    POST_NORM_ARCHITECTURES = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}

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


def find_site(model: Any, layer: int, name: str) -> Site:
    """The hook, with the gain and offset if any, which give a named tensor of one layer.

        site = sm.find_site(model, 8, "mlp_in")
        _, cache = model.run_with_cache(tokens, names_filter=[site.hook_name])
        mlp_in = site(cache[site.hook_name])  # [prompts, context_size, d_model]

    A HookedProxyLM is run on four tokens, to see which module puts out which tensor.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM, or one of them compiled.
        layer: from 0.
        name: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in" or "ln2_normalized".
            "mlp_in" is the MLP's true input; "mlp_out" and "attn_out" are what is added to the residual
            stream, behind a post-norm where there is one; "ln2_normalized" is "mlp_in" before the norm's
            gain.

    Raises:
        ValueError: an unknown name, a layer out of range, a kind of model or a structure which
            is not recognised, or a tensor which no hook of this model gives.
    """
    model = uncompiled(model)
    if name not in SITE_NAMES:
        raise ValueError(
            f"name={name!r} is not a known site{did_you_mean(str(name), SITE_NAMES)}. "
            f"The known sites are {', '.join(SITE_NAMES)}"
        )
    if isinstance(model, HookedTransformer):
        sites = _hooked_transformer_sites(model, layer)
    elif isinstance(model, TransformerBridge):
        sites = _bridge_sites(model, layer)
    elif isinstance(model, HookedProxyLM):
        sites = hf_sites(uncompiled(model.model), layer)
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


def _hooked_transformer_sites(model: HookedTransformer, layer: int) -> dict[str, Site | str]:
    """Each site, or why no hook of a HookedTransformer gives it."""
    cfg = model.cfg
    check_layer(layer, cfg.n_layers)
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
    gain = gain_of(model, model.get_submodule(f"{block}ln2")) or ()
    return sites | {"mlp_in": Site(normalized, *gain), "ln2_normalized": Site(normalized)}


def _bridge_sites(model: TransformerBridge, layer: int) -> dict[str, Site | str]:
    """Each site, or why no hook of a TransformerBridge gives it.

    The bridge's names (hook_resid_mid, hook_mlp_out and so on) follow its architecture: behind a
    post-norm, absent where attention and MLP are parallel. Unlike hook_mlp_in they always fire.
    """
    blocks: Any = getattr(model, "blocks", ())
    check_layer(layer, len(blocks))
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
