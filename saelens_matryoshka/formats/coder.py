"""What all formats have in common: the weights of one SAE or transcoder, and what they mean.

A format module turns files into a `SparseCoder` and back; this module turns a `SparseCoder` into SAELens's
config and state dict and back. A sparse coder computes, from x `[d_in]`,

    pre = (x - b_dec·[subtract_b_dec]) W_enc + b_enc
    f   = relu(pre), kept where pre > threshold (JumpReLU), or where it is one of the k largest (TopK)
    out = f W_dec + b_dec + W_skip x
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from sae_lens import SAE
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import DTYPE_MAP, DTYPE_TO_STR

from saelens_matryoshka.architectures.transcoder import fold_gain
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths
from saelens_matryoshka.widths import cumulative_widths

StateDict = dict[str, torch.Tensor]

# What SAELens calls a coder by: transcoder?, skip?, threshold?, k?
_SAE_ARCHITECTURES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}
_TRANSCODER_ARCHITECTURES = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}
_SKIP_ARCHITECTURES = {"relu": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}
_READABLE = {*_SAE_ARCHITECTURES.values(), *_TRANSCODER_ARCHITECTURES.values(), *_SKIP_ARCHITECTURES.values()}

# How text is read for an evaluation, where a file does not say how it was in training.
_TEXT_DEFAULTS = {"prepend_bos": True, "context_size": 128}

# Of a file's own note about itself, what is believed (a metadata's attributes may be anything).
_NOTE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model_name": str,
    "hook_name": str,
    "hook_name_out": str,
    "hf_hook_name": str,
    "hf_hook_name_out": str,
    "input_frame": str,
    "inference_activation": str,
    "converted_from": str,
    "dataset_path": str,
    "neuronpedia_id": str,
    "sae_lens_training_version": str,
    "context_size": int,
    "l0": (int, float),
    "hook_head_index": int,
    "prepend_bos": bool,
    "exclude_special_tokens": (bool, list),
    "sequence_separator_token": str,
    "disable_concat_sequences": bool,
    "seqpos_slice": list,
    "matryoshka_widths": list,
    "model_from_pretrained_kwargs": dict,
}
_METADATA_FIELDS = {**_NOTE_FIELDS, "training_architecture_details": dict, "model_class_name": str}


@dataclass(frozen=True)
class SparseCoder:
    """One SAE or transcoder, in SAELens's orientation."""

    W_enc: torch.Tensor
    """`[d_in, d_sae]`"""
    b_enc: torch.Tensor
    """`[d_sae]`"""
    W_dec: torch.Tensor
    """`[d_sae, d_out]`"""
    b_dec: torch.Tensor
    """`[d_out]`"""
    threshold: torch.Tensor | None = None
    """`[d_sae]`, of a JumpReLU coder"""
    k: int | None = None
    """latents kept per token, of a TopK coder"""
    W_skip: torch.Tensor | None = None
    """`[d_out, d_in]`"""
    subtract_b_dec: bool = False
    """whether the encoder reads x - b_dec"""
    layer_norm: bool = False
    """whether each x is first centred and divided by its standard deviation, and the output scaled back"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """as in SAELens: model_name, hook_name, hook_name_out, matryoshka_widths, ..."""

    def __post_init__(self) -> None:
        if self.threshold is not None and self.k is not None:
            raise ValueError("A sparse coder has thresholds or k, not both.")

    @property
    def d_in(self) -> int:
        """Width of the source."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the target."""
        return self.W_dec.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another tensor than the one it reads."""
        target = self.metadata.get("hook_name_out")
        return target is not None and target != self.metadata.get("hook_name")

    @property
    def activation(self) -> Literal["relu", "jumprelu", "topk"]:
        """What decides which latents are active."""
        if self.k is not None:
            return "topk"
        return "relu" if self.threshold is None else "jumprelu"

    @property
    def widths(self) -> list[int]:
        """Cumulative widths of its nested levels, `[d_sae]` if none are known."""
        recorded = self.metadata.get("matryoshka_widths")
        return cumulative_widths(recorded, self.d_sae) if recorded else [self.d_sae]

    @property
    def trained_k(self) -> float | None:
        """The k that a model trained here, or with SAELens's BatchTopK, says it was trained with."""
        details = self.metadata.get("training_architecture_details")
        k = details.get("k") if isinstance(details, dict) else None
        return float(k) if isinstance(k, int | float) and k > 0 else None

    def with_metadata(self, **fields: Any) -> SparseCoder:
        """The same, with these entries of its metadata; None removes one."""
        merged = {**self.metadata, **fields}
        return dataclasses.replace(self, metadata={k: v for k, v in merged.items() if v is not None})

    def with_note(self, note: Mapping[str, Any]) -> SparseCoder:
        """The same, with what a note adds to its metadata; what the format itself says stands."""
        return self.with_metadata(**{k: v for k, v in note.items() if k not in self.metadata})

    def with_tensors(self, **tensors: Any) -> SparseCoder:
        """The same, with other tensors, or another k."""
        return dataclasses.replace(self, **tensors)

    def without_weights(self) -> SparseCoder:
        """The same with tensors that have shapes and no data, so that it takes no memory."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return self.with_tensors(**{name: tensor.to("meta") for name, tensor in tensors.items()})


# ---- SAELens


def to_saelens(coder: SparseCoder, device: str = "cpu", dtype: str | None = None) -> tuple[dict, StateDict]:
    """SAELens's config dictionary and state dict of a coder.

    Args:
        coder: The coder.
        device: Where SAELens shall put it.
        dtype: In which precision; None: that of its weights.

    Raises:
        FormatError: SAELens has no class for such a coder.
    """
    dtype = dtype or DTYPE_TO_STR.get(coder.W_enc.dtype, "float32")
    architecture = _architecture(coder)
    if "transcoder" in architecture:  # whose encoder reads x as it is
        coder = move_b_dec(coder, subtract=False)
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": dtype,
        "device": device,
        "apply_b_dec_to_input": coder.subtract_b_dec,
        "normalize_activations": "layer_norm" if coder.layer_norm else "none",
        "reshape_activations": "hook_z" if _reads_heads(coder.metadata) else "none",
        # SAELens takes a config without the version for one of before 6.0
        "metadata": {**_TEXT_DEFAULTS, **coder.metadata, "sae_lens_version": sae_lens_version},
    }
    if "transcoder" in architecture:
        cfg["d_out"] = coder.d_out
    state = {"W_enc": coder.W_enc, "b_enc": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if coder.k is not None:
        cfg |= {"k": coder.k, "rescale_acts_by_decoder_norm": False}
    if coder.threshold is not None:
        state["threshold"] = coder.threshold
    if coder.W_skip is not None:
        state["W_skip"] = coder.W_skip
    return cfg, {name: tensor.to(DTYPE_MAP[dtype]).contiguous() for name, tensor in state.items()}


def _reads_heads(metadata: Mapping[str, Any]) -> bool:
    """Whether the hook gives `[..., head, d_head]`, which an SAE reads as one vector."""
    one_head = metadata.get("hook_head_index") is not None
    return str(metadata.get("hook_name")).endswith("hook_z") and not one_head


def _architecture(coder: SparseCoder) -> str:
    if not coder.is_transcoder and coder.W_skip is None:
        return _SAE_ARCHITECTURES[coder.activation]
    # SAELens's SAE classes read the hook and replace hook_name_out, so where source and target have one
    # width they hold what its transcoder classes cannot: TopK, and a target scaled back by the source.
    needs_sae_class = coder.activation == "topk" or coder.layer_norm
    if not needs_sae_class:
        return (_TRANSCODER_ARCHITECTURES if coder.W_skip is None else _SKIP_ARCHITECTURES)[coder.activation]
    what, hint = ("per-token normalised", "") if coder.k is None else ("TopK", _CALIBRATE)
    if coder.W_skip is not None:
        raise FormatError(f"SAELens has no {what} transcoder with a skip.{hint}")
    if coder.d_in != coder.d_out:
        raise FormatError(
            f"SAELens has no {what} transcoder from {coder.d_in} to {coder.d_out} dimensions.{hint}"
        )
    return _SAE_ARCHITECTURES[coder.activation]


_CALIBRATE = (
    " Give it thresholds in place of k: `saelens-matryoshka import ... --calibrate-l0 --model MODEL`, or "
    "converter(..., threshold=...)."
)


def from_saelens(sae: SAE[Any]) -> SparseCoder:
    """The coder that an SAE or transcoder of SAELens is, on the CPU.

    Raises:
        FormatError: it is of an architecture, or normalises its input in a way, that no other format has.
    """
    sae = inference_model(sae)
    cfg, architecture = sae.cfg, sae.cfg.architecture()
    if architecture not in _READABLE:
        raise FormatError(f"A model of architecture {architecture!r} has no counterpart in other formats.")
    if cfg.normalize_activations not in ("none", "layer_norm"):
        raise FormatError(
            f"normalize_activations={cfg.normalize_activations!r}: fold it into the weights first; no other "
            "format has it."
        )
    if cfg.reshape_activations != "none" and not _reads_heads(cfg.metadata.to_dict()):
        raise FormatError(f"reshape_activations={cfg.reshape_activations!r}: no other format has it.")
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    metadata = {k: v for k, v in cfg.metadata.to_dict().items() if v is not None and k != "sae_lens_version"}
    if len(widths := matryoshka_widths(sae)) > 1:
        metadata["matryoshka_widths"] = widths  # also where SAELens's own architecture noted them
    coder = SparseCoder(
        W_enc=state["W_enc"],
        b_enc=state["b_enc"],
        W_dec=state["W_dec"],
        b_dec=state["b_dec"],
        threshold=state.get("threshold"),
        k=getattr(cfg, "k", None),
        W_skip=state.get("W_skip"),
        subtract_b_dec=bool(cfg.apply_b_dec_to_input),
        layer_norm=cfg.normalize_activations == "layer_norm",
        metadata=metadata,
    )
    return fold_decoder_norm(coder) if getattr(cfg, "rescale_acts_by_decoder_norm", False) else coder


def build(coder: SparseCoder, device: str = "cpu") -> SAE[Any]:
    """The stock SAELens object of a coder.

    Raises:
        FormatError: SAELens has no class for such a coder.
    """
    return SAE.load_from_disk(
        "",
        device=device,
        converter=lambda path, device, cfg_overrides: to_saelens(coder, device),  # noqa: ARG005
    ).eval()


# ---- the same function, written otherwise


def fold_decoder_norm(coder: SparseCoder) -> SparseCoder:
    """Decoder rows of norm 1; the activations are multiplied by the norms instead."""
    wide = torch.promote_types(coder.W_dec.dtype, torch.float32)
    dtype, norms = coder.W_dec.dtype, coder.W_dec.to(wide).norm(dim=-1).clamp(min=1e-8)
    scaled = {
        "W_enc": (coder.W_enc.to(wide) * norms).to(dtype),
        "b_enc": (coder.b_enc.to(wide) * norms).to(dtype),
        "W_dec": (coder.W_dec.to(wide) / norms[:, None]).to(dtype),
    }
    if coder.threshold is not None:
        scaled["threshold"] = (coder.threshold.to(wide) * norms).to(dtype)
    return coder.with_tensors(**scaled)


def move_b_dec(coder: SparseCoder, *, subtract: bool) -> SparseCoder:
    """The same function, with or without b_dec subtracted from the input: b_enc takes up the difference."""
    if coder.subtract_b_dec == subtract:
        return coder
    if coder.d_in != coder.d_out:
        raise FormatError(
            f"b_dec has {coder.d_out} entries, so it cannot be subtracted from an input of {coder.d_in}."
        )
    wide = torch.promote_types(coder.W_enc.dtype, torch.float32)
    shift = coder.b_dec.to(wide) @ coder.W_enc.to(wide)
    b_enc = coder.b_enc.to(wide) + (shift if subtract else -shift)
    return dataclasses.replace(coder, b_enc=b_enc.to(coder.b_enc.dtype), subtract_b_dec=subtract)


def scale_input(coder: SparseCoder, gain: torch.Tensor, offset: torch.Tensor | None) -> SparseCoder:
    """The coder that does for x what this one does for gain·x + offset.

    Args:
        coder: A transcoder.
        gain: `[d_in]`.
        offset: `[d_in]`, or None for 0.

    Raises:
        FormatError: the coder normalises its input, or subtracts b_dec from it.
    """
    if coder.layer_norm or coder.subtract_b_dec:
        raise FormatError("A gain cannot be folded into a model that normalises or centres its input.")
    folded = fold_gain(
        {name: value for name, value in vars(coder).items() if isinstance(value, torch.Tensor)},
        gain.cpu(),
        torch.zeros_like(gain).cpu() if offset is None else offset.cpu(),
    )
    return coder.with_tensors(**folded)


# ---- what a file says about itself


def believe(written: Any) -> dict[str, Any]:
    """What of metadata our own files in foreign formats carry, and of such a note is believed.

    Known fields of the right type; none if it is no mapping at all.
    """
    if not isinstance(written, Mapping):
        return {}
    return {k: v for k, v in written.items() if k in _NOTE_FIELDS and _is(v, _NOTE_FIELDS[k])}


def check_metadata(metadata: Any, label: str) -> dict[str, Any]:
    """SAELens's metadata, in which the fields that are used here have the types they should have.

    Raises:
        FormatError: they have not, or the metadata are no fields by name.
    """
    if not isinstance(metadata, dict):
        raise FormatError(f"{label}: metadata={metadata!r}, where settings by name are expected.")
    for key, value in metadata.items():
        kind = _METADATA_FIELDS.get(key)
        if value is not None and kind is not None and not _is(value, kind):
            expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise FormatError(f"{label}: metadata has {key}={value!r}, where {expected} is expected.")
    return metadata


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
