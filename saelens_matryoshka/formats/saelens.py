"""SAELens's own layout, `cfg.json` and `sae_weights.safetensors`: what this package trains and reads.

Older published Matryoshka SAEs do not say how wide their levels are; `widths` can be given to `converter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

from saelens_matryoshka.formats.coder import SparseCoder, build, from_saelens
from saelens_matryoshka.formats.files import FormatError, read_json, read_safetensors
from saelens_matryoshka.formats.layout import folders_with, join
from saelens_matryoshka.formats.sources import Source

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


class Writer:
    """Writes stock folders.

    Args:
        out: Where; of a single model it is the folder itself.
        several: Whether there will be several, or the one has a folder of its own all the same.
    """

    def __init__(self, out: Path, several: bool) -> None:
        self.out, self.several = out, several

    def add(self, coder: SparseCoder, name: str, /) -> None:
        """Write one."""
        build(coder).save_model(self.out / name if self.several else self.out)

    def close(self) -> None:
        """Nothing is left to do."""


def read(source: Source, item: str, device: str = "cpu") -> SAE[Any]:
    """The stock object of one model's folder.

    Raises:
        FormatError: the files are not what the format says.
    """
    config_path = source.file(join(item, SAE_CFG_FILENAME))
    path = source.file(join(item, SAE_WEIGHTS_FILENAME))
    tensors = read_safetensors(path, _SHAPES, set(_SHAPES) - {"W_enc", "W_dec", "b_dec"})
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.equal(scaling, torch.ones_like(scaling)):
        raise FormatError(f"{path}: has a fine-tuned scaling_factor, which SAELens itself has to load.")
    try:
        cfg = handle_config_defaulting(read_json(config_path))
        # so that SAELens does not take it for a config of before 6.0 once more, and drop the metadata
        cfg["metadata"] = {**cfg.get("metadata", {}), "sae_lens_version": sae_lens_version}
        sae = SAE.load_from_disk(
            config_path.parent,
            converter=lambda path, device, cfg_overrides: (cfg | {"device": device}, tensors),  # noqa: ARG005
            device=device,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"{config_path} and {path.name} make no model: {reason}") from None
    return sae.eval()
