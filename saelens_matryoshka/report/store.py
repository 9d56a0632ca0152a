"""Samples on disk: written whole or not at all, and never mixed with those of other settings.

samples/samples.safetensors   all of them, compactly; what the page and the formats are made from
samples/json/                 one file per latent (--format json)
samples/neuronpedia/          --format neuronpedia
samples/circuit-tracer/       --format circuit-tracer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens import SAE

from saelens_matryoshka.files.fingerprint import differences, hash_of_weights
from saelens_matryoshka.report.samples import Samples, has_samples


def stored_samples(
    folder: Path,
    settings: dict[str, Any],
    *,
    instead: str = "give --overwrite to replace them, or another --out",
) -> Samples | None:
    """The samples in a folder, if of these settings; None if the folder is empty or missing.

    Args:
        folder: Where they are.
        settings: All that must agree; "weights" is the `hash_of_weights`.
        instead: What the user can do if they do not.

    Raises:
        ValueError: the folder holds other samples, or something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not folder.is_dir() or not has_samples(folder):
        raise ValueError(f"{folder} is there and holds something else than samples: {instead}.")
    samples = Samples.load(folder)
    found = samples.about.get("settings", {})
    if said := differences(found, settings):
        raise ValueError(f"{folder} holds samples of other settings ({said}): {instead}.")
    return samples


def stored_with(folder: Path, sae: SAE[Any]) -> Samples | None:
    """The samples in a folder, whatever their settings, if they are of these weights; None if there are none.

    Raises:
        ValueError: they are of other weights.
    """
    instead = "collect them again with `saelens-matryoshka samples ... --overwrite`, or remove them"
    return stored_samples(folder, {"weights": hash_of_weights(sae)}, instead=instead)
