"""Text to train or evaluate on, from files and folders on this machine or from the hub."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OF_ONE, _OF_SPLITS = "dataset_info.json", "dataset_dict.json"
_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class TextError(ValueError):
    """A text that is not there, or cannot be read; the message begins with its name."""


def is_text_file(name: str) -> bool:
    """Whether a name is that of a file which `open_text` reads, there or not."""
    return Path(name).suffix in _FORMATS


def is_saved_dataset(name: str) -> bool:
    """Whether a name is that of a folder which `save_to_disk` of `datasets` has written."""
    return any((Path(name).expanduser() / file).is_file() for file in (_OF_ONE, _OF_SPLITS))


def open_text(name: str, split: str = "train", *, streaming: bool = True) -> Any:
    """A dataset of a .txt, .jsonl, .json, .parquet or .csv file, a saved dataset, or one of the hub.

    Raises:
        TextError: there is no such file, dataset or split, it cannot be read, or it is empty.
    """
    from datasets import load_dataset, load_from_disk

    path = Path(name).expanduser()
    if is_text_file(name):
        if not path.is_file():
            raise TextError(f"{name!r}: there is no such file.")
        # escaped, because `datasets` takes a name for a pattern
        kind, files = _FORMATS[path.suffix], {split: glob.escape(str(path))}
        return _readable(name, lambda: load_dataset(kind, data_files=files, split=split, streaming=streaming))
    if path.is_file():
        raise TextError(f"{name!r}: a file must be of text and end in {', '.join(_FORMATS)}.")
    if (path / _OF_ONE).is_file():
        return _readable(name, lambda: load_from_disk(str(path)))
    if (path / _OF_SPLITS).is_file():
        saved = _readable(name, lambda: load_from_disk(str(path)))
        if split not in saved:
            raise TextError(f"{name!r} has no split {split!r}, but {', '.join(saved)}.")
        return saved[split]
    return _readable(name, lambda: load_dataset(name, split=split, streaming=streaming))


def _readable(name: str, read: Callable[[], Any]) -> Any:
    """A dataset, once its first row has been read."""
    try:
        documents = read()
        empty = next(iter(documents), None) is None
    except StopIteration:  # a file without a line
        empty = True
    except (ValueError, OSError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TextError(f"{name!r} cannot be read: {reason}") from None
    if empty:
        raise TextError(f"{name!r}: it is empty.")
    return documents
