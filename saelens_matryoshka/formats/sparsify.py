"""sparsify (EleutherAI, `eai-sparsify`): one folder per hookpoint, `cfg.json` and `sae.safetensors`.

A sparsify coder keeps the k largest of every token. Its folder is named after the module it was trained on,
as `model.base_model` calls it: an SAE reads and replaces the module's output, a transcoder (`transcode`)
predicts the output from the module's input, so for "layers.3.mlp" it reads the MLP's true input and predicts
what the MLP puts out before any post-norm.

    encoder.weight [F, d]   encoder.bias [F]   W_dec [F, d]   b_dec [d]   W_skip [d, d] (x @ W_skip.T)

b_dec is subtracted from the input of an SAE, not of a transcoder.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from typing_extensions import override

from saelens_matryoshka.formats import layout
from saelens_matryoshka.formats.coder import SparseCoder, StateDict, move_b_dec
from saelens_matryoshka.formats.files import (
    FormatError,
    field,
    read_json,
    read_safetensors,
    require_k,
)
from saelens_matryoshka.formats.layout import (
    folders_with,
    join,
    read_note,
    require_plain,
    save_with_note,
)
from saelens_matryoshka.formats.sources import Source
from saelens_matryoshka.sites import block_hook

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_SHAPES = {
    "encoder.weight": ("num_latents", "d_in"),
    "encoder.bias": ("num_latents",),
    "W_dec": ("num_latents", "d_in"),
    "b_dec": ("d_in",),
    "W_skip": ("d_in", "d_in"),
}
# A sub-module of a layer: hooks of its input and its output.
_SITES = {
    "": ("hook_resid_pre", "hook_resid_post"),
    "mlp": ("mlp.hook_in", "mlp.hook_out"),
    "self_attn": ("attn.hook_in", "attn.hook_out"),
    "attention": ("attn.hook_in", "attn.hook_out"),
    "attn": ("attn.hook_in", "attn.hook_out"),
}
_ATTENTION = ("self_attn", "attention", "attn")
# What the blocks and the attention are called in `model.base_model`, by the language model's name. Nothing is
# said of models with an image tower, nor of those whose MLP is no module (OPT).
_NAMES: tuple[tuple[str, str, str], ...] = (
    (r".*gpt2.*|gpt-neo-.*|tiny-?stories-.*|gpt-j-.*", "h", "attn"),
    (r"pythia-.*|gpt-neox-.*", "layers", "attention"),
    (
        r"tiny|(meta-|code)?llama-(?!.*vision)[\d.]+-?\d*b?.*|mistral-(7b|nemo).*|qwen(1\.5|2|2\.5|3)-[\d.]+b.*"
        r"|gemma-(2-)?\d+b.*|gemma-3-(270m|1b).*|phi-(1|1_5|2)|olmo-(2-)?[\d-]*b.*",
        "layers",
        "self_attn",
    ),
)
_HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?")


def items(source: Source, inside: str = "") -> list[str]:
    """The hookpoints' folders."""
    return folders_with(source, inside, (CONFIG, WEIGHTS))


def load(source: Source, item: str) -> SparseCoder:
    """Read one hookpoint's folder.

    Raises:
        FormatError: the files are not what the format says, or select their latents in groups.
    """
    path = source.file(join(item, WEIGHTS))
    config_path = source.file(join(item, CONFIG))
    config = read_json(config_path)
    hookpoint = PurePosixPath(item).name
    field(config, "d_in", int, config_path)
    if not config.get("num_latents"):
        config["num_latents"] = config["d_in"] * field(config, "expansion_factor", int, config_path)
    field(config, "num_latents", int, config_path)
    field(config, "k", int, config_path)
    shapes = {name: tuple(config[dim] for dim in dims) for name, dims in _SHAPES.items()}
    optional = () if config.get("skip_connection") else ("W_skip",)
    tensors = read_safetensors(path, shapes, optional)
    coder = from_state(config, tensors, hookpoint, str(config_path))
    training = source.find(join(str(PurePosixPath(item).parent), "config.json"))
    model = read_json(training).get("model") if training else None
    if isinstance(model, str):
        coder = coder.with_metadata(model_name=model)
    return coder.with_note(read_note(path))


def from_state(
    config: dict[str, Any], tensors: StateDict, hookpoint: str, label: str = CONFIG
) -> SparseCoder:
    """The coder of a sparsify config (with `num_latents` and `d_in` filled in) and state dict.

    Args:
        config: The contents of `cfg.json`.
        tensors: The contents of `sae.safetensors`.
        hookpoint: The name of the folder.
        label: What to call the config in messages.

    Raises:
        FormatError: `activation` is not "topk", latents of either sign are kept, or k is out of range.
    """
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise FormatError(
            f"{label}: activation={activation!r} keeps the largest latent of each of k groups, which no "
            "other library has."
        )
    if config.get("signed"):
        raise FormatError(
            f"{label}: signed=True keeps latents of either sign, which no class of SAELens does."
        )
    k = require_k(config["k"], config["num_latents"], f"{label}: k")
    transcode = bool(config.get("transcode"))
    return SparseCoder(
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k if k < config["num_latents"] else None,  # all of them: nothing but the ReLU
        W_skip=tensors.get("W_skip"),
        subtract_b_dec=not transcode,
        metadata={**_hooks(hookpoint, transcode), "converted_from": "sparsify"},
    )


def _hooks(hookpoint: str, transcode: bool) -> dict[str, str]:
    match = _HOOKPOINT.fullmatch(hookpoint)
    site = _SITES.get(match[2] or "") if match else None
    if match is None or site is None:
        return {"hook_name": "hook_embed"} if hookpoint == "embed_tokens" and not transcode else {}
    source, target = (f"blocks.{match[1]}.{hook}" for hook in site)
    if not transcode:
        return {"hook_name": target, "hf_hook_name": f"{hookpoint}.output"}
    return {
        "hook_name": source,
        "hook_name_out": target,
        "hf_hook_name": f"{hookpoint}.input",
        "hf_hook_name_out": f"{hookpoint}.output",
    }


def to_state(coder: SparseCoder) -> tuple[dict[str, Any], StateDict]:
    """sparsify's config and state dict of a coder.

    Raises:
        FormatError: sparsify has no such coder.
    """
    require_plain(coder, "sparsify")
    if coder.activation == "jumprelu":
        raise FormatError(
            "sparsify keeps the k largest latents of every token and has no thresholds, so it cannot carry a "
            "JumpReLU model. Give --topk K for a TopK model of the same weights, which is another function."
        )
    if coder.d_in != coder.d_out:
        raise FormatError(f"sparsify has one width; this coder maps {coder.d_in} to {coder.d_out}.")
    if not coder.is_transcoder and coder.W_skip is not None:
        raise FormatError("sparsify has no SAE with a skip.")
    coder = move_b_dec(coder, subtract=not coder.is_transcoder)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, coder.d_sae // coder.d_in),
        "normalize_decoder": False,  # it is what it is; True would only matter in training
        "num_latents": coder.d_sae,
        "k": coder.k or coder.d_sae,
        "multi_topk": False,
        "skip_connection": coder.W_skip is not None,
        "transcode": coder.is_transcoder,
        "d_in": coder.d_in,
    }
    tensors = {
        "encoder.weight": coder.W_enc.T.contiguous(),
        "encoder.bias": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    return config, tensors


def hookpoint_of(coder: SparseCoder) -> str:
    """The module whose input and output a coder reads and predicts.

    Raises:
        FormatError: there is no such module, or what the language model calls it is not known.
    """
    metadata = coder.metadata
    source, target = metadata.get("hook_name"), metadata.get("hook_name_out") or metadata.get("hook_name")
    block, block_out = block_hook(source), block_hook(target)
    if (named := _named_module(coder)) is not None:
        return named
    if block and block_out and block[0] == block_out[0]:
        for module, (hook_in, hook_out) in _SITES.items():
            read = hook_in if coder.is_transcoder else hook_out
            if (block[1], block_out[1]) == (read, hook_out):
                return _module(str(metadata.get("model_name")), block[0], module)
    hint = ""
    if block_out and block_out[1] == "hook_mlp_out":
        hint = " (hook_mlp_out is behind the norm that follows the MLP in some models.)"
    if coder.is_transcoder and block and block[1] == "ln2.hook_normalized":
        hint = " Where no norm follows the MLP, --frame mlp_in --model MODEL moves it to the module's."
    raise FormatError(
        f"sparsify names a coder by the module whose input and output it knows, and no module reads "
        f"{source!r} and puts out {target!r}.{hint}"
    )


def _module(model_name: str, layer: int, module: str) -> str:
    """A module of a block, as the language model calls it."""
    name = model_name.rpartition("/")[2]
    for pattern, blocks, attention in _NAMES:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return f"{blocks}.{layer}.{attention if module in _ATTENTION else module}".rstrip(".")
    raise FormatError(
        f"sparsify names a coder by a module of the language model, and what {model_name!r} calls its "
        "modules is not known here. Write it into the metadata in cfg.json: hf_hook_name (of a transcoder "
        "hf_hook_name_out too), e.g. 'layers.3.mlp.output' ('layers.3.mlp.input' and 'layers.3.mlp.output')."
    )


def _named_module(coder: SparseCoder) -> str | None:
    """The module that the metadata name themselves, as they do of what came from sparsify."""
    metadata = coder.metadata
    target = metadata.get("hf_hook_name_out" if coder.is_transcoder else "hf_hook_name")
    match = re.fullmatch(r"(\w+(?:\.\w+)*)\.output", str(target))
    if match is None or (coder.is_transcoder and metadata.get("hf_hook_name") != f"{match[1]}.input"):
        return None
    return match[1]


class Writer(layout.Writer):
    """Writes a folder per coder, named after its module."""

    @override
    def add(self, coder: SparseCoder, _name: str, /) -> None:
        folder = self.out / hookpoint_of(coder)
        config, tensors = to_state(coder)
        if folder.exists():
            raise FormatError(f"Two of the models are of module {folder.name!r}; sparsify has one of each.")
        folder.mkdir()
        save_with_note(tensors, folder / WEIGHTS, coder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2))
