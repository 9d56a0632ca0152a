"""What format modules share: finding the parts of a set, our note in a file."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from saelens_matryoshka.files.names import natural
from saelens_matryoshka.formats.coder import SparseCoder, StateDict, believe
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.formats.sources import Source

NOTE = "saelens_matryoshka"
"""Under this key our files in foreign formats carry the metadata those formats have no place for."""


def folders_with(source: Source, inside: str, files: Collection[str]) -> list[str]:
    """The folders at or below `inside` that hold all of these files, by the numbers in their names."""
    names = source.names(inside)
    folders = {str(PurePosixPath(name).parent) for name in names}
    present = set(names)
    return sorted((f for f in folders if all(join(f, file) in present for file in files)), key=natural)


def join(folder: str, name: str) -> str:
    """A path in a source; the source's own folder is "" or "."."""
    return str(PurePosixPath(folder) / name)


class Writer:
    """Writes models into a folder, one at a time: a set of large models need not fit into memory.

    Args:
        out: The folder.
        several: Whether there will be several, or the one has a folder of its own all the same.
    """

    def __init__(self, out: Path, several: bool) -> None:
        self.out, self.several = out, several

    def add(self, coder: SparseCoder, name: str, /) -> None:
        """Write one, in a folder of that name if need be.

        Raises:
            FormatError: the format cannot carry it, or not beside those before.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Write what is of all of them.

        Raises:
            FormatError: they make no set.
        """


def require_plain(coder: SparseCoder, name: str) -> None:
    """Refuse what no format but SAELens's has.

    Raises:
        FormatError: the coder normalises every token's input.
    """
    if coder.layer_norm:
        raise FormatError(f"{name} has nothing like normalize_activations='layer_norm', which this needs.")


def save_with_note(tensors: StateDict, path: Path, coder: SparseCoder) -> None:
    """Write a safetensors file with our note in its header."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", NOTE: json.dumps(believe(coder.metadata))})


def read_note(path: Path) -> dict[str, Any]:
    """What to believe of the note in a safetensors file, whose tensors have been read before."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(NOTE, "")
    try:
        return believe(json.loads(text))
    except (ValueError, RecursionError):
        return {}
