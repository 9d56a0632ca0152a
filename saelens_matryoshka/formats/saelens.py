"""SAELens's own layout, `cfg.json` and `sae_weights.safetensors`: what this package trains and reads.

Older published Matryoshka SAEs do not say how wide their levels are; `widths` can be given to `converter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from typing_extensions import override

from saelens_matryoshka.formats import layout
from saelens_matryoshka.formats.coder import SparseCoder, build, check_metadata, from_saelens
from saelens_matryoshka.formats.files import (
    FormatError,
    field,
    read_json,
    read_safetensors,
    safetensors_shapes,
)
from saelens_matryoshka.formats.layout import folders_with, join
from saelens_matryoshka.formats.sources import Source
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths
from saelens_matryoshka.scaling import SCALED, fold_scaling
from saelens_matryoshka.upkeep.checkpoints import Checkpoints

_SHAPES = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
    "W_skip": ("d_out", "d_in"),
    "b_gate": ("d_sae",),
    "b_mag": ("d_sae",),
    "r_mag": ("d_sae",),
    "scaling_factor": ("d_sae",),
}


def items(source: Source, inside: str = "") -> list[str]:
    """The folders with a model."""
    return folders_with(source, inside, (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME))


def load(source: Source, item: str) -> SparseCoder:
    """Read one model's folder.

    Raises:
        FormatError: the files are not what the format says, or it is of an architecture no other format has.
    """
    return from_saelens(read(source, item))


class Writer(layout.Writer):
    """Writes stock folders."""

    @override
    def add(self, coder: SparseCoder, name: str, /) -> None:
        build(coder).save_model(self.out / name if self.several else self.out)


def read(source: Source, item: str, device: str = "cpu") -> SAE[Any]:
    """The stock object of one model's folder.

    Raises:
        FormatError: the files are not what the format says.
    """
    config_path = source.file(join(item, SAE_CFG_FILENAME))
    path = source.file(join(item, SAE_WEIGHTS_FILENAME))
    cfg = _config(config_path)
    _check_sizes(cfg, path, config_path)
    tensors = read_safetensors(path, _SHAPES, set(_SHAPES) - {"W_enc", "W_dec", "b_dec"})
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.equal(scaling, torch.ones_like(scaling)):
        raise FormatError(f"{path}: has a fine-tuned scaling_factor, which SAELens itself has to load.")
    # so that SAELens does not take it for a config of before 6.0 once more, and drop the metadata
    cfg["metadata"] = {**cfg["metadata"], "sae_lens_version": sae_lens_version}
    try:
        sae = SAE.load_from_disk(
            config_path.parent,
            converter=lambda path, device, cfg_overrides: (cfg | {"device": device}, tensors),  # noqa: ARG005
            device=device,
        )
        matryoshka_widths(sae)
    except Exception as error:
        raise _no_model(config_path, error) from None
    return sae.eval()


def _unfinished(folder: Path) -> str:
    """A hint at what there is of a run that has not come to its end, if the folder is that of one."""
    if not (folder / "config.yaml").is_file():
        return ""
    paths = Checkpoints(folder / "checkpoints").paths()
    whole = next((path for path in paths if (path / SAE_CFG_FILENAME).is_file()), None)
    newest = "" if whole is None else f" Its newest checkpoint is '{whole}'."
    return f" Is it a run that is not finished? `train --resume` goes on with it.{newest}"


def open_folder(folder: Path, device: str = "cpu") -> SAE[Any]:
    """The model of a folder of SAELens's, of any architecture it has.

    Args:
        folder: A stock folder, or a checkpoint in training, which gives the model it would be saved as.
        device: Where to put it.

    Raises:
        FormatError: the folder holds no model, or not what its config says.
    """
    config_path, path = folder / SAE_CFG_FILENAME, folder / SAE_WEIGHTS_FILENAME
    if not config_path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{SAE_CFG_FILENAME}"))
        hint = f" Name one of those in it: {', '.join(inside[:5])}." if inside else _unfinished(folder)
        raise FormatError(
            f"'{folder}' holds no SAE: a folder saved by SAELens has a {SAE_CFG_FILENAME} in it.{hint}"
        )
    if not path.is_file():
        raise FormatError(f"'{folder}' holds no weights: there is no {SAE_WEIGHTS_FILENAME} in it.")
    cfg = _config(config_path)
    _check_sizes(cfg, path, config_path)
    in_training = cfg["architecture"] not in SAE_CLASS_REGISTRY
    try:
        sae = (TrainingSAE if in_training else SAE).load_from_disk(folder, device=device)
    except Exception as error:
        raise _no_model(config_path, error) from None
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{path}: tensor {name!r} has NaN or infinite values.")
    if isinstance(sae, TrainingSAE):
        _fold_scaling_of(sae, folder)
    return inference_model(sae).eval()


def _fold_scaling_of(sae: TrainingSAE[Any], folder: Path) -> None:
    """Fold what the trainer scales the activations by, which a checkpoint has in a file of its own."""
    if sae.cfg.normalize_activations not in SCALED:
        return
    path, scaler = folder / ACTIVATION_SCALER_CFG_FILENAME, ActivationScaler()
    try:
        scaler.load(path)
        if scaler.scaling_factor is None and scaler.whitening is None:
            raise ValueError("it has no factor")
        fold_scaling(sae, scaler)
    except Exception as error:
        reason = f"there is no {path.name} in it" if not path.is_file() else f"{path.name}: {error}"
        raise FormatError(
            f"'{folder}' was trained with normalize_activations={sae.cfg.normalize_activations!r}, and does "
            f"not say by what: {reason}. Take the whole folder of the checkpoint."
        ) from None


def _no_model(config_path: Path, error: Exception) -> FormatError:
    """Of a config that SAELens or torch could not make a model of, with whatever error they gave up."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return FormatError(f"{config_path} and {SAE_WEIGHTS_FILENAME} make no model: {reason}")


def _config(path: Path) -> dict[str, Any]:
    """The config of a folder, whose architecture and metadata can be relied on."""
    cfg = read_json(path)
    check_metadata(cfg.get("metadata", {}), str(path))
    try:
        cfg = handle_config_defaulting(cfg)
    except Exception as error:
        raise _no_model(path, error) from None
    cfg["metadata"] = check_metadata(cfg.get("metadata", {}), str(path))
    architecture = field(cfg, "architecture", str, path)
    if architecture not in SAE_CLASS_REGISTRY and architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise FormatError(f"{path}: architecture={architecture!r} is none that SAELens has.")
    return cfg


def _check_sizes(cfg: dict[str, Any], path: Path, config_path: Path) -> None:
    """Compare the config with the tensors' shapes, before anything of the config's size is made."""
    shapes = safetensors_shapes(path)
    sizes = {name: field(cfg, name, int, config_path) for name in ("d_in", "d_sae")}
    for tensor, dim, name in (("W_enc", 0, "d_in"), ("W_enc", 1, "d_sae"), ("W_dec", 0, "d_sae")):
        shape = shapes.get(tensor)
        if shape is not None and (len(shape) != 2 or shape[dim] != sizes[name]):
            raise FormatError(
                f"{config_path} and {path.name} make no model: {name}={sizes[name]}, but tensor {tensor!r} "
                f"has shape {list(shape)}."
            )
