"""Gemma Scope: Google DeepMind's SAEs and transcoders of Gemma 2 (`params.npz`) and Gemma 3 (safetensors).

All JumpReLU, with one threshold per latent, in float32; b_dec is not subtracted from the input.

Gemma Scope 1, `layer_N/width_16k/average_l0_X/params.npz`: `W_enc [d, F], W_dec [F, d], b_enc, b_dec,
threshold [F]`. A transcoder reads `ln2.hook_normalized`, *before* the norm's gain, and predicts
`hook_mlp_out`.

Gemma Scope 2, `transcoder[_all]/layer_N_width_W_l0_X[_affine]/{config.json, params.safetensors}`: the same
tensors as `w_enc`, `w_dec`, and optionally `affine_skip_connection [d_in, d_out]` (transposed: W_skip). A
transcoder reads the output of `pre_feedforward_layernorm`, so *after* the gain: TransformerBridge's
`mlp.hook_in`. (`hook_mlp_in`, which SAELens declares for them, is the tensor before the norm.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saelens_matryoshka.formats.coder import SparseCoder, StateDict
from saelens_matryoshka.formats.files import FormatError, Shapes, read_json, read_npz, read_safetensors
from saelens_matryoshka.formats.layout import folders_with, join
from saelens_matryoshka.formats.sources import HubRepository, Source

NPZ, PARAMS, CONFIG = "params.npz", "params.safetensors", "config.json"

_NPZ_SHAPES: Shapes = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
}
_PARAMS_SHAPES: Shapes = {
    "w_enc": ("d_in", "d_sae"),
    "w_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
    "affine_skip_connection": ("d_in", "d_out"),
}
# What a repository's or folder's name says was read, and what was predicted.
_SITES_1 = {
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
}
_REPOSITORY_1 = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(transcoders|res|mlp|att)")
_SITES_2 = {
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
    "resid_post": ("hook_resid_post", None),
    "mlp_out": ("hook_mlp_out", None),
    "attn_out": ("attn.hook_z", None),
}
_HF_SITES_2 = {
    r"pre_feedforward_layernorm\.output": "mlp.hook_in",
    r"post_feedforward_layernorm\.output": "hook_mlp_out",
    r"output": "hook_resid_post",
    r"self_attn\.o_proj\.input": "attn.hook_z",
}


def items_1(source: Source, inside: str = "") -> list[str]:
    """The folders with a `params.npz`."""
    return folders_with(source, inside, (NPZ,))


def load_1(source: Source, item: str) -> SparseCoder:
    """Read one folder of Gemma Scope 1.

    What was read is told by the names of repository and folders alone; where they do not tell it, it must be
    given.

    Raises:
        FormatError: the file is not what the format says.
    """
    coder = from_npz(source.file(join(item, NPZ)))
    metadata: dict[str, Any] = {}
    where = f"{source.label}/{item}"
    layer, named = _layer(where), _REPOSITORY_1.search(where)
    if l0 := re.search(r"average_l0_(\d+)", where):
        metadata["l0"] = int(l0[1])
    if named:
        metadata["model_name"] = f"gemma-2-{named[1]}" + ("-it" if named[2] == "it" else "")
        if layer is not None:
            metadata |= _hooks(layer, *_SITES_1[named[3]])
    return coder.with_metadata(**metadata, context_size=1024, converted_from="Gemma Scope")


def items_2(source: Source, inside: str = "") -> list[str]:
    """The folders with a `params.safetensors`."""
    return folders_with(source, inside, (PARAMS,))


def load_2(source: Source, item: str) -> SparseCoder:
    """Read one folder of Gemma Scope 2; where it has no `config.json`, its name tells what it is of.

    Raises:
        FormatError: the files are not what the format says, or a cross-layer transcoder's.
    """
    path, config_path = source.file(join(item, PARAMS)), source.find(join(item, CONFIG))
    config = read_json(config_path) if config_path else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{config_path}: architecture={config['architecture']!r}, expected 'jump_relu'.")
    coder = from_params(path)
    has_skip = coder.W_skip is not None
    if config.get("affine_connection") not in (None, has_skip):
        raise FormatError(
            f"{config_path}: affine_connection={config['affine_connection']!r}, but {path.name} has "
            f"{'a' if has_skip else 'no'} tensor 'affine_skip_connection'."
        )
    metadata = _declared(config, str(config_path)) or _named(item)
    model = config.get("model_name")
    if isinstance(source, HubRepository) and not isinstance(model, str):
        model = source.repo_id.replace("gemma-scope-2", "gemma-3")
    if isinstance(model, str):
        metadata["model_name"] = "google/" + model.removeprefix("google/").replace("-v3", "-3")
    return coder.with_metadata(**metadata, context_size=1024, converted_from="Gemma Scope 2")


def _declared(config: dict[str, Any], label: str) -> dict[str, Any]:
    """Hooks of the Hugging Face hook points that a config names."""
    points = [config.get("hf_hook_point_in"), config.get("hf_hook_point_out")]
    hooks = [_from_hf(point, label) for point in points if isinstance(point, str)]
    if not hooks:
        return {}
    metadata = {"hook_name": hooks[0], "hf_hook_name": points[0]}
    if len(hooks) > 1 and hooks[1] != hooks[0]:
        metadata |= {"hook_name_out": hooks[1], "hf_hook_name_out": points[1]}
    return metadata


def _from_hf(point: str, label: str) -> str:
    for pattern, hook in _HF_SITES_2.items():
        if match := re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\." + pattern, point):
            return f"blocks.{match[1]}.{hook}"
    raise FormatError(f"{label}: hook point {point!r} is not one that Gemma Scope 2 uses.")


def _named(item: str) -> dict[str, Any]:
    layer, site = _layer(item), next((site for site in _SITES_2 if site in item), None)
    return _hooks(layer, *_SITES_2[site]) if layer is not None and site else {}


def _hooks(layer: int, source: str, target: str | None) -> dict[str, Any]:
    metadata = {"hook_name": f"blocks.{layer}.{source}"}
    if target:
        metadata["hook_name_out"] = f"blocks.{layer}.{target}"
    if source == "ln2.hook_normalized":
        metadata["input_frame"] = "normalized"
    return metadata


def _layer(item: str) -> int | None:
    layers = re.findall(r"layer_(\d+)", item)
    return int(layers[-1]) if layers else None


def from_npz(path: Path) -> SparseCoder:
    """The coder of a `params.npz`, without its hooks."""
    return from_state(read_npz(path, _NPZ_SHAPES))


def from_params(path: Path) -> SparseCoder:
    """The coder of a `params.safetensors`, without its hooks."""
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    tensors = read_safetensors(path, _PARAMS_SHAPES, ("affine_skip_connection",))
    return from_state({names.get(name, name): tensor for name, tensor in tensors.items()})


def from_state(tensors: StateDict) -> SparseCoder:
    """The coder of Gemma Scope's tensors, without its hooks."""
    skip = tensors.get("affine_skip_connection")
    return SparseCoder(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
        W_skip=None if skip is None else skip.T,
    )
