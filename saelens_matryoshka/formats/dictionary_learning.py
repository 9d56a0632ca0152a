"""dictionary_learning (saprmarks; also SAEBench's published SAEs): `ae.pt` and `config.json` in a folder.

SAEs only. `config.json` is `{"trainer": {dict_class, activation_dim, dict_size, k, layer, lm_name,
submodule_name, group_sizes, ...}, "buffer": {...}}`; what `ae.pt` holds depends on the class:

- MatryoshkaBatchTopKSAE, one threshold: W_enc [d, F], b_enc, W_dec [F, d], b_dec, k, threshold, group_sizes
- BatchTopKSAE, one threshold: encoder.weight [F, d], encoder.bias, decoder.weight [d, F], b_dec, k, threshold
- AutoEncoderTopK, the k largest of each token: the same; its threshold is not used
- JumpReluAutoEncoder, a threshold per latent: W_enc [d, F], b_enc, W_dec [F, d], b_dec, threshold [F]

b_dec is subtracted from the input, except by JumpReluAutoEncoder.
"""

from __future__ import annotations

import json
import re
import warnings
from itertools import accumulate, pairwise
from typing import Any

import torch
from typing_extensions import override

from saelens_matryoshka.formats import layout
from saelens_matryoshka.formats.coder import SparseCoder, StateDict, believe, move_b_dec
from saelens_matryoshka.formats.files import (
    FormatError,
    Shapes,
    field,
    read_json,
    read_pickle,
    require_k,
)
from saelens_matryoshka.formats.layout import NOTE, folders_with, join, require_plain
from saelens_matryoshka.formats.sources import Source
from saelens_matryoshka.sites import block_hook

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR: Shapes = {
    "encoder.weight": ("dict_size", "activation_dim"),
    "encoder.bias": ("dict_size",),
    "decoder.weight": ("activation_dim", "dict_size"),
    "b_dec": ("activation_dim",),
    "k": (),
    "threshold": (),
}
_MATRICES: Shapes = {
    "W_enc": ("activation_dim", "dict_size"),
    "b_enc": ("dict_size",),
    "W_dec": ("dict_size", "activation_dim"),
    "b_dec": ("activation_dim",),
}
_SHAPES: dict[str, Shapes] = {
    "MatryoshkaBatchTopKSAE": {**_MATRICES, "k": (), "threshold": (), "group_sizes": ("n_groups",)},
    "BatchTopKSAE": _LINEAR,
    "AutoEncoderTopK": _LINEAR,
    "JumpReluAutoEncoder": {**_MATRICES, "threshold": ("dict_size",)},
}
_INTEGERS = ("k", "group_sizes")
_SUBMODULES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}


def items(source: Source, inside: str = "") -> list[str]:
    """The folders with a dictionary."""
    return folders_with(source, inside, (CONFIG, WEIGHTS))


def load(source: Source, item: str) -> SparseCoder:
    """Read one folder.

    Raises:
        FormatError: the files are not what the format says, or of a class that SAELens has not.
    """
    config_path = source.file(join(item, CONFIG))
    config = read_json(config_path)
    trainer = field(config, "trainer", dict, config_path)
    dict_class = field(trainer, "dict_class", str, config_path)
    if dict_class not in _SHAPES:
        raise FormatError(
            f"{config_path}: dict_class={dict_class!r} cannot be read; {', '.join(_SHAPES)} can."
        )
    path = source.file(join(item, WEIGHTS))
    optional = ("threshold", "k") if dict_class == "AutoEncoderTopK" else ()
    tensors = read_pickle(path, _SHAPES[dict_class], optional, _INTEGERS)
    for name, size in (("activation_dim", len(tensors["b_dec"])), ("dict_size", _n_latents(tensors))):
        if trainer.get(name, size) != size:
            raise FormatError(f"{config_path}: {name}={trainer[name]!r}, but {path} has {size}.")
    coder = from_state(trainer, tensors, str(config_path))
    buffer = config.get("buffer")
    context = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    if isinstance(context, int):
        coder = coder.with_metadata(context_size=context)
    return coder.with_note(believe(config.get(NOTE)))


def _n_latents(tensors: StateDict) -> int:
    return len(tensors["b_enc"] if "b_enc" in tensors else tensors["encoder.bias"])


def from_state(trainer: dict[str, Any], tensors: StateDict, label: str = CONFIG) -> SparseCoder:
    """The coder of the trainer's part of a config and a state dict.

    Raises:
        FormatError: the threshold was never set, or k or the groups do not fit.
    """
    dict_class = trainer["dict_class"]
    linear = "encoder.weight" in tensors
    coder = SparseCoder(
        W_enc=tensors["encoder.weight"].T if linear else tensors["W_enc"],
        b_enc=tensors["encoder.bias"] if linear else tensors["b_enc"],
        W_dec=tensors["decoder.weight"].T if linear else tensors["W_dec"],
        b_dec=tensors["b_dec"],
        subtract_b_dec=dict_class != "JumpReluAutoEncoder",
        metadata={**_metadata(trainer), "converted_from": f"dictionary_learning {dict_class}"},
    )
    if dict_class == "AutoEncoderTopK":
        k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
        return coder.with_tensors(k=require_k(k, coder.d_sae, f"{label}: k"))
    threshold = tensors["threshold"]
    if dict_class != "JumpReluAutoEncoder" and threshold.item() < 0:
        warnings.warn(
            f"{label}: this {dict_class} was saved before its threshold was first set, so its inference "
            "function is a plain ReLU. Thresholds can be fitted with --calibrate-l0.",
            stacklevel=2,
        )
    else:
        threshold = threshold.to(coder.b_enc.dtype).expand(coder.d_sae).contiguous()
        coder = coder.with_tensors(threshold=threshold)
    return coder.with_metadata(matryoshka_widths=_widths(tensors, coder.d_sae, label))


def _widths(tensors: StateDict, d_sae: int, label: str) -> list[int] | None:
    if "group_sizes" not in tensors:
        return None
    groups = [int(size) for size in tensors["group_sizes"]]
    if sum(groups) != d_sae or min(groups) < 1:
        raise FormatError(f"{label}: group_sizes={groups} do not add up to dict_size={d_sae}.")
    return list(accumulate(groups))


def _metadata(trainer: dict[str, Any]) -> dict[str, Any]:
    model, layer, submodule = (trainer.get(name) for name in ("lm_name", "layer", "submodule_name"))
    metadata: dict[str, Any] = {}
    if isinstance(model, str):
        metadata["model_name"] = model
    site = re.sub(r"_layer_\d+$", "", submodule) if isinstance(submodule, str) else "resid_post"
    if isinstance(layer, int) and site in _SUBMODULES:
        metadata["hook_name"] = f"blocks.{layer}.{_SUBMODULES[site]}"
    return metadata


def to_state(coder: SparseCoder) -> tuple[dict[str, Any], StateDict]:
    """The trainer's part of a config, and a state dict.

    A JumpReLU coder with one threshold for all latents becomes a MatryoshkaBatchTopKSAE (or a BatchTopKSAE if
    it has one level), any other a JumpReluAutoEncoder, which has no place for the widths: our note has them.

    Raises:
        FormatError: dictionary_learning has no such coder.
    """
    require_plain(coder, "dictionary_learning")
    if coder.is_transcoder or coder.W_skip is not None:
        raise FormatError(
            "dictionary_learning has SAEs only: its config names one tensor, and this is a transcoder"
            + (f" from {coder.metadata.get('hook_name')!r}." if coder.is_transcoder else " with a skip.")
            + " circuit-tracer and sparsify have transcoders."
        )
    if coder.threshold is None and coder.k is None:
        coder = coder.with_tensors(threshold=torch.zeros_like(coder.b_enc))
    if coder.k is not None:
        dict_class, threshold = "AutoEncoderTopK", torch.tensor(-1.0)
    else:
        assert coder.threshold is not None
        uniform = bool((coder.threshold == coder.threshold[0]).all()) and coder.threshold[0].item() >= 0
        if uniform and coder.subtract_b_dec:
            threshold = coder.threshold[0].clone().float()
            dict_class = "BatchTopKSAE" if len(coder.widths) == 1 else "MatryoshkaBatchTopKSAE"
        else:
            dict_class, threshold = "JumpReluAutoEncoder", coder.threshold
    coder = move_b_dec(coder, subtract=dict_class != "JumpReluAutoEncoder")
    tensors: StateDict = {"b_dec": coder.b_dec, "threshold": threshold}
    if "W_enc" in _SHAPES[dict_class]:
        tensors |= {"W_enc": coder.W_enc, "b_enc": coder.b_enc, "W_dec": coder.W_dec}
    else:
        tensors["encoder.weight"], tensors["encoder.bias"] = coder.W_enc.T.contiguous(), coder.b_enc
        tensors["decoder.weight"] = coder.W_dec.T.contiguous()
    trainer = {
        "dict_class": dict_class,
        "activation_dim": coder.d_in,
        "dict_size": coder.d_sae,
        **_trainer_fields(coder),
    }
    if dict_class != "JumpReluAutoEncoder":
        # BatchTopK's k only says how it was trained; inference goes by the threshold
        trainer["k"] = coder.k or max(1, round(coder.trained_k or 1))
        tensors["k"] = torch.tensor(trainer["k"], dtype=torch.int)
    if dict_class == "MatryoshkaBatchTopKSAE":
        trainer["group_sizes"] = [high - low for low, high in pairwise([0, *coder.widths])]
        tensors["group_sizes"] = torch.tensor(trainer["group_sizes"])
    return trainer, tensors


def _trainer_fields(coder: SparseCoder) -> dict[str, Any]:
    """Where it was trained. Raises FormatError if the config has no name for that tensor."""
    metadata = coder.metadata
    block = block_hook(metadata.get("hook_name"))
    submodules = {hook: name for name, hook in _SUBMODULES.items()}
    if block is None or block[1] not in submodules:
        raise FormatError(
            f"dictionary_learning names a tensor by layer and submodule ({', '.join(_SUBMODULES)}), and has "
            f"none for {metadata.get('hook_name')!r}."
        )
    layer, hook = block
    return {
        "lm_name": metadata.get("model_name"),
        "layer": layer,
        "submodule_name": f"{submodules[hook]}_layer_{layer}",
    }


class Writer(layout.Writer):
    """Writes a folder per coder."""

    @override
    def add(self, coder: SparseCoder, name: str, /) -> None:
        trainer, tensors = to_state(coder)
        folder = self.out / name if self.several else self.out
        folder.mkdir(exist_ok=True)
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
        config = {
            "trainer": trainer,
            "buffer": {"ctx_len": coder.metadata.get("context_size")},
            NOTE: believe(coder.metadata),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2))
