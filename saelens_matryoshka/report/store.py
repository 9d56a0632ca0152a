"""Samples on disk: written whole or not at all, and never mixed with those of other settings.

samples/samples.safetensors   all of them, compactly; what the page and the formats are made from
samples/json/                 one file per latent (--format json)
samples/neuronpedia/          --format neuronpedia
samples/circuit-tracer/       --format circuit-tracer
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import SAE

from saelens_matryoshka.fingerprint import differences, hash_of_weights
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


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its place under its name once all is written.

    Raises:
        ValueError: there is something under that name, and it is not to be overwritten.
    """
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give --overwrite to replace it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            old = new.with_name(f"{new.name}.old")
            os.replace(folder, old)
            os.replace(new, folder)
            shutil.rmtree(old)
        else:
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def stored_with(folder: Path, sae: SAE[Any]) -> Samples | None:
    """The samples in a folder, whatever their settings, if they are of these weights; None if there are none.

    Raises:
        ValueError: they are of other weights.
    """
    instead = "collect them again with `saelens-matryoshka samples ... --overwrite`, or remove them"
    return stored_samples(folder, {"weights": hash_of_weights(sae)}, instead=instead)
