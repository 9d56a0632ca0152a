"""llamascopium / Language-Model-SAEs (OpenMOSS): `config.json` and `sae_weights.safetensors`.

    W_E [d, F]   b_E [F]   W_D [F, d]   b_D [d]   activation_function.log_jumprelu_threshold [F]
    dataset_average_activation_norm.HOOK   (scalar, one per hook)

Of these, `sae_type: sae` is read: an SAE, or where `hook_point_out` is another hook, a transcoder. What its
own code computes, and what is therefore folded into the weights here:

- with `norm_activation: dataset-wise`, source and target are scaled to an average norm of √d by the stored
  norms (with `inference` they were folded before);
- with `sparsity_include_decoder_norm`, pre-activations are compared with the threshold (or with one another)
  after multiplication by the decoder norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from saelens_matryoshka.formats.coder import SparseCoder, StateDict, fold_decoder_norm
from saelens_matryoshka.formats.files import (
    FormatError,
    field,
    read_json,
    read_safetensors,
    require_k,
)
from saelens_matryoshka.formats.layout import folders_with, join
from saelens_matryoshka.formats.sources import Source

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm."
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"


def items(source: Source, inside: str = "") -> list[str]:
    """The folders with an SAE or transcoder."""
    return folders_with(source, inside, (CONFIG, WEIGHTS))


def load(source: Source, item: str) -> SparseCoder:
    """Read one folder.

    Raises:
        FormatError: the files are not what the format says, or of a kind that SAELens has not.
    """
    config_path = source.file(join(item, CONFIG))
    config = read_json(config_path)
    kind = field(config, "sae_type", str, config_path)
    if kind != "sae":
        raise FormatError(
            f"{config_path}: sae_type={kind!r} is no SAE and no transcoder of one layer; "
            "'sae' (SAEs and per-layer transcoders) can be read."
        )
    for name in ("hook_point_in", "hook_point_out", "act_fn", "norm_activation"):
        field(config, name, str, config_path)
    d_model = field(config, "d_model", int, config_path)
    try:
        d_sae = d_model * field(config, "expansion_factor", (int, float), config_path)
    except OverflowError:
        d_sae = math.inf
    if isinstance(d_sae, float) and not d_sae.is_integer():
        raise FormatError(f"{config_path}: d_model · expansion_factor = {d_sae} is no whole number.")
    if config.get("use_glu_encoder"):
        raise FormatError(f"{config_path}: use_glu_encoder is on, which no class of SAELens has.")
    latents, hooks = int(d_sae), {config["hook_point_in"], config["hook_point_out"]}
    shapes = {
        "W_E": (d_model, latents),
        "b_E": (latents,),
        "W_D": (latents, d_model),
        "b_D": (d_model,),
        **{_NORM + hook: () for hook in hooks},
        _LOG_THRESHOLD: (latents,),
    }
    optional = {_NORM + hook for hook in hooks if config["norm_activation"] != "dataset-wise"}
    if config.get("use_decoder_bias") is False:
        optional.add("b_D")
    if config["act_fn"] != "jumprelu":
        optional.add(_LOG_THRESHOLD)
    tensors = read_safetensors(source.file(join(item, WEIGHTS)), shapes, optional)
    return from_state(config, tensors, str(config_path))


def from_state(config: dict[str, Any], tensors: StateDict, label: str = CONFIG) -> SparseCoder:
    """The coder of a config and a state dict.

    Raises:
        FormatError: `act_fn` or `norm_activation` is one that depends on other tokens, or unknown.
    """
    source, target = config["hook_point_in"], config["hook_point_out"]
    activation, k, threshold = config["act_fn"], None, None
    if activation == "jumprelu":
        threshold = tensors[_LOG_THRESHOLD].exp()
    elif activation == "topk":
        k = require_k(config.get("top_k"), len(tensors["b_E"]), f"{label}: top_k")
    elif activation != "relu":
        raise FormatError(
            f"{label}: act_fn={activation!r} compares the latents of many tokens, so it is no function of "
            "one. Convert it to jumprelu with llamascopium first."
        )
    coder = SparseCoder(
        W_enc=tensors["W_E"],
        b_enc=tensors["b_E"],
        W_dec=tensors["W_D"],
        b_dec=tensors.get("b_D", torch.zeros_like(tensors["W_D"][0])),
        threshold=threshold,
        k=k,
        metadata={
            "hook_name": source,
            **({} if target == source else {"hook_name_out": target}),
            "converted_from": "llamascopium",
        },
    )
    if config.get("sparsity_include_decoder_norm", True):
        coder = _select_by_decoder_norm(coder)
    norm = config["norm_activation"]
    if norm == "dataset-wise":
        scales = [
            math.sqrt(coder.d_in) / _positive(tensors[_NORM + hook], label) for hook in (source, target)
        ]
        coder = _fold_norms(coder, *scales)
    elif norm != "inference":
        raise FormatError(f"{label}: norm_activation={norm!r} cannot be folded into the weights.")
    return coder


def _positive(norm: torch.Tensor, label: str) -> float:
    if not norm.item() > 0:
        raise FormatError(f"{label}: an average activation norm is {norm.item():g}, which cannot be.")
    return norm.item()


def _select_by_decoder_norm(coder: SparseCoder) -> SparseCoder:
    """The coder whose latents are active where those of `coder` are, times their decoder norm."""
    if coder.k is not None:
        return fold_decoder_norm(coder)
    if coder.threshold is None:
        return coder
    norms = coder.W_dec.float().norm(dim=-1)
    # a latent without decoder is never compared with anything finite, as 0 never exceeds the threshold
    threshold = coder.threshold.float() / norms.clamp(min=1e-30)
    return coder.with_tensors(threshold=threshold.clamp(max=torch.finfo(torch.float32).max))


def _fold_norms(coder: SparseCoder, source: float, target: float) -> SparseCoder:
    """The coder that does for x and y what `coder` does for source·x and target·y."""
    return coder.with_tensors(
        W_enc=coder.W_enc.float() * source,
        b_enc=coder.b_enc.float(),
        W_dec=coder.W_dec.float() / target,
        b_dec=coder.b_dec.float() / target,
    )
