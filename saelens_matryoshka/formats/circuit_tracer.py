"""circuit-tracer: a set of transcoders, one file per layer and a `config.yaml` for all of them.

`config.yaml`: `model_name`, `model_kind: transcoder_set`, the hooks of every block without their "blocks.N."
(`feature_input_hook`, `feature_output_hook`), and optionally `transcoders`, a list of references, one per
layer, in place of the files `layer_N.safetensors`:

    W_enc [F, d]   b_enc [F]   W_dec [F, d]   b_dec [d]
    activation_function.threshold [F]   (without it: ReLU)
    W_skip [d_out, d_in] (x @ W_skip.T)

The tracer loads its language model with norms not folded, wants the layers 0 to the last with equal F, zeroes
the features of the first position, and reads no k: a TopK transcoder would silently become a ReLU one. So
what is written here always has its thresholds.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from typing_extensions import override

from saelens_matryoshka.files.names import natural
from saelens_matryoshka.formats import gemma_scope, layout
from saelens_matryoshka.formats.coder import SparseCoder, StateDict, move_b_dec
from saelens_matryoshka.formats.files import (
    FormatError,
    field,
    read_safetensors,
    read_yaml,
    require_k,
    safetensors_shapes,
)
from saelens_matryoshka.formats.layout import (
    join,
    read_note,
    require_plain,
    save_with_note,
)
from saelens_matryoshka.formats.sources import Source, hub_uri, safe_relative
from saelens_matryoshka.sites import block_hook

CONFIG = "config.yaml"
_LAYER = re.compile(r"(?:layer_)?(\d+)(?:\.safetensors)?")
_THRESHOLD = "activation_function.threshold"
_SHAPES = {
    "W_enc": ("d_transcoder", "d_in"),
    "b_enc": ("d_transcoder",),
    "W_dec": ("d_transcoder", "d_out"),
    "b_dec": ("d_out",),
    _THRESHOLD: ("d_transcoder",),
    "W_skip": ("d_out", "d_in"),
}


def items(source: Source, inside: str = "") -> list[str]:
    """The layers' files (of a set that lists references, the names they would have)."""
    names = source.names(inside)
    found = [name for name in names if re.fullmatch(r"layer_\d+\.safetensors", PurePosixPath(name).name)]
    for name in names:
        if PurePosixPath(name).name == CONFIG:
            listed = read_yaml(source.file(name)).get("transcoders")
            folder = str(PurePosixPath(name).parent)
            if isinstance(listed, list):
                found += [join(folder, f"layer_{layer}.safetensors") for layer in range(len(listed))]
    return sorted(set(found), key=natural)


def load(source: Source, item: str) -> SparseCoder:
    """Read one layer.

    Args:
        source: The set.
        item: The layer's file; the suffix, and "layer_", may be left out.

    Raises:
        FormatError: the files are not what the format says, or a cross-layer transcoder's.
    """
    folder, match = str(PurePosixPath(item).parent), _LAYER.fullmatch(PurePosixPath(item).name)
    if match is None:
        raise FormatError(f"{item!r} is no layer of a circuit-tracer set, like 'layer_3.safetensors'.")
    layer = int(match[1])
    config, config_path = _config(source, folder)
    reference = _reference(config, layer, config_path) if config_path else None
    path = _fetch(source, folder, reference or f"layer_{layer}.safetensors")
    if path.suffix == ".npz":
        coder = gemma_scope.from_npz(path)
    elif "w_enc" in safetensors_shapes(path):
        coder = gemma_scope.from_params(path)
    else:
        tensors = read_safetensors(path, _SHAPES, (_THRESHOLD, "W_skip"))
        coder = from_state(config, tensors, str(config_path or path))
    hooks = {
        ours: f"blocks.{layer}.{config[theirs]}"
        for ours, theirs in (("hook_name", "feature_input_hook"), ("hook_name_out", "feature_output_hook"))
        if isinstance(config.get(theirs), str)
    }
    frame = "normalized" if config.get("feature_input_hook") == "ln2.hook_normalized" else None
    model_name = config.get("model_name")
    coder = coder.with_metadata(
        **hooks,
        input_frame=frame,
        model_name=model_name if isinstance(model_name, str) else None,
        model_from_pretrained_kwargs={"fold_ln": False},
        converted_from="circuit-tracer",
    )
    return coder if path.suffix == ".npz" else coder.with_note(read_note(path))


def _config(source: Source, folder: str) -> tuple[dict[str, Any], Path | None]:
    path = source.find(join(folder, CONFIG))
    if path is None:
        return {}, None  # some published sets have none; the hooks must then be given
    config = read_yaml(path)
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise FormatError(
            f"{path}: model_kind={kind!r}; only per-layer sets (transcoder_set) can be read. The decoders of "
            "a cross-layer transcoder write to many layers, which no class of SAELens does."
        )
    for name in ("feature_input_hook", "feature_output_hook"):
        field(config, name, str, path)
    return config, path


def _reference(config: dict[str, Any], layer: int, path: Path) -> str | None:
    listed = config.get("transcoders")
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise FormatError(f"{path}: transcoders={listed!r} must be a list of references, one per layer.")
    if layer >= len(listed):
        raise FormatError(f"{path}: there is no layer {layer}; transcoders lists {len(listed)}.")
    return listed[layer]


def _fetch(source: Source, folder: str, reference: str) -> Path:
    if reference.startswith("hf://"):
        repository, path = hub_uri(reference)
        return repository.file(path)
    return source.file(join(folder, safe_relative(reference, source.label)))


def from_state(config: dict[str, Any], tensors: StateDict, label: str = CONFIG) -> SparseCoder:
    """The coder of a config and a layer's state dict, without what the config says of hooks.

    Raises:
        FormatError: `activation` and the tensors contradict each other.
    """
    activation, threshold = config.get("activation"), tensors.get(_THRESHOLD)
    k = None
    if activation == "topk":
        k = require_k(config.get("k"), len(tensors["b_enc"]), f"{label}: k")
    elif activation not in (None, "relu", "jumprelu", "jump_relu"):
        raise FormatError(f"{label}: activation={activation!r} is not one that circuit-tracer has.")
    if threshold is not None and activation in ("topk", "relu"):
        raise FormatError(f"{label}: activation={activation!r}, but the file has thresholds.")
    return SparseCoder(
        W_enc=tensors["W_enc"].T,
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=threshold,
        k=k,
        W_skip=tensors.get("W_skip"),
    )


def to_state(coder: SparseCoder) -> StateDict:
    """The state dict of a layer's file.

    Raises:
        FormatError: circuit-tracer has no such coder.
    """
    require_plain(coder, "circuit-tracer")
    if not coder.is_transcoder:
        raise FormatError(
            "circuit-tracer replaces MLPs by transcoders, and the model of "
            f"{coder.metadata.get('hook_name')!r} is an SAE: it predicts the tensor it reads."
        )
    if coder.k is not None:
        raise FormatError(
            "circuit-tracer reads no k from a file, so a TopK transcoder would become a ReLU one: give it "
            "thresholds with --calibrate-l0."
        )
    if coder.d_in != coder.d_out:
        raise FormatError(f"circuit-tracer has one width; this coder maps {coder.d_in} to {coder.d_out}.")
    frame = coder.metadata.get("input_frame")
    if frame == "normalized_folded":
        raise FormatError(
            "circuit-tracer loads its language model with norms not folded, and this transcoder was trained "
            "on one with norms folded (input_frame='normalized_folded'). Train it on a model loaded with "
            "no processing (model_from_pretrained_kwargs={'fold_ln': False})."
        )
    coder = move_b_dec(coder, subtract=False)
    tensors = {
        "W_enc": coder.W_enc.T,
        "b_enc": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    if coder.threshold is not None:
        # below 0 the tracer would let negative values through, where SAELens's ReLU does not
        tensors[_THRESHOLD] = coder.threshold.clamp(min=0)
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


class Writer(layout.Writer):
    """Writes a set: a file per layer, and the config once all are there."""

    def __init__(self, out: Path, several: bool) -> None:
        super().__init__(out, several)
        self.layers: set[int] = set()
        self.common: dict[str, Any] = {}

    @override
    def add(self, coder: SparseCoder, _name: str, /) -> None:
        tensors, metadata = to_state(coder), coder.metadata
        source, target = (block_hook(metadata.get(name)) for name in ("hook_name", "hook_name_out"))
        if source is None or target is None or source[0] != target[0]:
            raise FormatError(
                "circuit-tracer needs source and target in one block, and this transcoder maps "
                f"{metadata.get('hook_name')!r} to {metadata.get('hook_name_out')!r}."
            )
        layer = source[0]
        if layer in self.layers:
            raise FormatError(f"Two of the transcoders are of layer {layer}; a set has one per layer.")
        self.layers.add(layer)
        for what, value in {
            "source hooks": source[1],
            "target hooks": target[1],
            "numbers of latents": coder.d_sae,
            "skips (with or without)": coder.W_skip is not None,
            "language models": metadata.get("model_name"),
        }.items():
            if self.common.setdefault(what, value) != value:
                raise FormatError(
                    f"The transcoders of a circuit-tracer set need equal {what}; that of layer {layer} has "
                    f"{value!r}, others {self.common[what]!r}."
                )
        save_with_note(tensors, self.out / f"layer_{layer}.safetensors", coder)

    @override
    def close(self) -> None:
        missing = sorted(set(range(max(self.layers) + 1)) - self.layers)
        if missing:
            raise FormatError(
                f"circuit-tracer loads sets of all layers from 0 on, and there is none of layer {missing[0]} "
                f"(only of {', '.join(map(str, sorted(self.layers)))}). Give a folder with one transcoder "
                "per layer."
            )
        config = {
            "model_name": self.common["language models"],
            "model_kind": "transcoder_set",
            "feature_input_hook": self.common["source hooks"],
            "feature_output_hook": self.common["target hooks"],
        }
        (self.out / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
