"""Mappings by name: which hooks, and how wide, "the MLP of layer 8" is on a language model.

| mapping | source | target |
|---|---|---|
| `mlp` | the MLP's true input | what the MLP adds to the residual stream |
| `attention` | the residual stream before the layer | what attention adds to it |
| `layer` | the residual stream before the layer | the residual stream after it |
| `cross-layer:8-12` | the residual stream after layer 8 | the residual stream after layer 12 |

An SAE reconstructs the target; without a mapping, the residual stream after its layer. Hooks are looked up on
the model's structure alone, built without memory for weights, so nothing but its configuration is needed.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from saelens_matryoshka import tiny
from saelens_matryoshka.runs.fields import did_you_mean
from saelens_matryoshka.runs.language_models import ModelShape, hooked_config
from saelens_matryoshka.sites import find_site

_SITES = {
    "mlp": ("mlp_in", "mlp_out"),
    "attention": ("resid_pre", "attn_out"),
    "layer": ("resid_pre", "resid_post"),
}
_CROSS_LAYER = re.compile(r"cross-layer:(\d+)-(\d+)")
NAMES = (*_SITES, "cross-layer:A-B")

DERIVED = ("hook_name", "hook_name_out", "input_gain", "d_in", "d_out")
"""The settings that a mapping gives."""


class NoModelConfigError(ValueError):
    """A language model's configuration is not at hand."""


@dataclass(frozen=True)
class Mapping:
    """What a mapping resolves to on one model."""

    label: str
    """short, e.g. "mlp-8"; names the folder of its runs"""
    hook_name: str
    width: int
    hook_name_out: str | None = None
    input_gain: str = "none"

    def settings(self) -> dict[str, Any]:
        """As settings of a run."""
        found: dict[str, Any] = {"hook_name": self.hook_name, "d_in": self.width}
        if self.hook_name_out is not None:
            found |= {"hook_name_out": self.hook_name_out, "d_out": self.width, "input_gain": self.input_gain}
        return found


def find_mapping(model: Any, name: str | None, layer: int | None, *, transcoder: bool) -> Mapping:
    """The hooks of a mapping on a model.

    Args:
        model: A HookedTransformer; its weights are not looked at.
        name: One of `NAMES`. None: `mlp` for a transcoder.
        layer: Whose. None with `cross-layer:A-B`, which names its layers itself.
        transcoder: Or else an SAE.

    Raises:
        ValueError: the name is none of them, a layer is missing or not the model's.
    """
    width, n_layers = model.cfg.d_model, model.cfg.n_layers
    name = ("mlp" if transcoder else None) if name is None else name
    crossing = _CROSS_LAYER.fullmatch(name or "")
    if crossing:
        return _cross_layer(model, int(crossing[1]), int(crossing[2]), layer, transcoder)
    if name is not None and name not in _SITES:
        close = did_you_mean(name, [*_SITES, "cross-layer:0-1"])
        raise ValueError(f"--mapping {name!r} is not known{close} There are {', '.join(NAMES)}.")
    if layer is None:
        raise ValueError(f"--layer is needed with --mapping {name}: 0 to {n_layers - 1} on this model.")
    _require_layer("--layer", layer, n_layers)
    if not transcoder:
        site = _SITES[name][1] if name else "resid_post"
        return Mapping(f"{site}-{layer}", find_site(model, layer, site).hook_name, width)
    assert name is not None
    source, target = (find_site(model, layer, site) for site in _SITES[name])
    gain = "none" if source.gain is None else "norm_weight"
    return Mapping(f"{name}-{layer}", source.hook_name, width, target.hook_name, gain)


def _cross_layer(model: Any, low: int, high: int, layer: int | None, transcoder: bool) -> Mapping:
    name = f"cross-layer:{low}-{high}"
    if layer is not None:
        raise ValueError(f"--layer {layer} with --mapping {name}, which names its layers: leave out --layer.")
    if not transcoder:
        raise ValueError(f"--mapping {name} has a source and a target, an SAE one hook: give --layer {high}.")
    for end in (low, high):
        _require_layer(f"--mapping {name}: layer", end, model.cfg.n_layers)
    if low >= high:
        raise ValueError(f"--mapping {name}: the target's layer must be later than the source's.")
    source, target = (find_site(model, end, "resid_post").hook_name for end in (low, high))
    return Mapping(name.replace(":", "-"), source, model.cfg.d_model, target)


def _require_layer(said: str, layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise ValueError(f"{said} {layer}: the model has {n_layers} layers, 0 to {n_layers - 1}.")


@cache
def skeleton(model_name: str) -> Any:
    """A HookedTransformer of a model's structure, without memory for weights.

    Raises:
        NoModelConfigError: its configuration is neither on this machine nor to be had from the hub.
        ValueError: TransformerLens does not know the model.
    """
    if model_name in tiny.NAMES:
        return tiny.load_hooked_transformer()
    try:
        config = hooked_config(model_name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise NoModelConfigError(
            f"model_name {model_name!r}: its configuration cannot be read. {reason}"
        ) from None
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return ModelShape(model_name, config).build("meta")
    finally:
        logging.disable(level)
