"""Text to train or evaluate on, from files and folders on this machine or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def is_text_file(name: str) -> bool:
    """Whether a name is that of a file which `open_text` reads, there or not."""
    return Path(name).suffix in _FORMATS


def open_text(name: str, split: str = "train", *, streaming: bool = True) -> Any:
    """A dataset of a .txt, .jsonl, .json, .parquet or .csv file, a saved dataset, or one of the hub.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from datasets import load_dataset, load_from_disk

    path = Path(name)
    if is_text_file(name):
        if not path.is_file():
            raise FileNotFoundError(f"{name!r}: there is no such file.")
        return load_dataset(
            _FORMATS[path.suffix], data_files={split: str(path)}, split=split, streaming=streaming
        )
    if (path / "dataset_info.json").is_file():
        return load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))[split]
    return load_dataset(name, split=split, streaming=streaming)
