"""What the commands print and write."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from rich.console import Console, RenderableType

from saelens_matryoshka.atomic import write_atomically


def write_result(shown: RenderableType, numbers: str, described: str, json: Path | None) -> None:
    """Print a result, with the text it was measured on, and write its numbers if asked to."""
    if json is not None and str(json) == "-":
        print(numbers)
        return
    console = Console(highlight=False)
    console.print(shown)
    console.print(f"text: {described}", markup=False)
    if json is not None:
        write_atomically(json, numbers + "\n")
        console.print(f"written: {json}", markup=False)


def require_writable(json: Path | None) -> None:
    """Check, before any work, that `write_result` will be able to write.

    Raises:
        ValueError: the path is a folder, or below a file, or not writable.
    """
    if json is None or str(json) == "-":
        return
    if json.is_dir():
        raise ValueError(f"--json {str(json)!r} is a folder: name a file.")
    above = next(folder for folder in json.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"--json {str(json)!r} cannot be written: {above} is a file.")
    if not os.access(above, os.W_OK):
        raise ValueError(f"--json {str(json)!r} cannot be written: {above} is read-only.")


def quieten() -> None:
    """Hide notices that tell the user of a command nothing."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for message in (
        "Dataset is not tokenized",
        "The training dataset contains fewer samples",
        "All samples in the training dataset have been exhausted",
        r"\nThis SAE has non-empty model_from_pretrained_kwargs",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it then raises
