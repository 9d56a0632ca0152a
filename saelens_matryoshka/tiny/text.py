"""Real text that every Python installation carries: the standard library's own sources.

The split into train and held-out files depends on nothing but a file's path inside the library,
so a file is on the same side on every machine and in every Python version.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Literal

from datasets import Dataset

Split = Literal["train", "held_out"]

_HELD_OUT_ONE_IN = 10

# Every full standard library has several times as many files; a zipped or stripped one may leave
# a few behind, on which nothing can be trained.
_FEWEST_FILES = 100

# Third-party code, tests (as large as the library itself, and full of generated input), build
# leftovers that name the machine Python was built on, and `encodings`, which is character tables
# and near-copies of one codec file: copies on both sides would make held-out text look easy.
_EXCLUDED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
_EXCLUDED_FILES = {"html/entities.py", "pydoc_data/topics.py"}  # generated tables


def _path_hash(relative: PurePosixPath) -> int:
    return int.from_bytes(hashlib.sha256(str(relative).encode()).digest(), "big")


def _split_of(relative: PurePosixPath) -> Split:
    return "held_out" if _path_hash(relative) % _HELD_OUT_ONE_IN == 0 else "train"


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_excluded_name(name: str) -> bool:
    return name in _EXCLUDED_FOLDERS or name.startswith(_EXCLUDED_PREFIXES)


def stdlib_files(split: Split) -> list[Path]:
    """Lists the standard library's source files that belong to one split.

    Args:
        split: `"train"` (about nine files in ten) or `"held_out"` (the tenth).

    Returns:
        Absolute paths of `.py` files, sorted by a hash of their path inside the library, so that
        neighbours in the list are about different subjects.

    Raises:
        ValueError: if `split` is neither of the two names.
        FileNotFoundError: if this Python has no standard library sources on disk.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {split!r}')
    root = _stdlib_root()
    found: list[PurePosixPath] = []
    # os.walk, not rglob: folders can be pruned, and site-packages is often the larger part.
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_excluded_name(name)]
        for name in names:
            if name.endswith(".py") and not _is_excluded_name(name):
                found.append(PurePosixPath((Path(folder) / name).relative_to(root).as_posix()))
    found = [path for path in found if str(path) not in _EXCLUDED_FILES]
    if len(found) < _FEWEST_FILES:
        raise FileNotFoundError(
            f"only {len(found)} standard library sources (*.py) under {root}: this Python seems to "
            "be zipped or stripped to bytecode. Use one whose library is on disk as source files."
        )
    found.sort(key=_path_hash)
    return [root / path for path in found if _split_of(path) == split]


def dataset(split: Split) -> Dataset:
    """Reads one split of the standard library as documents.

    Files that are empty or not UTF-8 are left out.

    Args:
        split: `"train"` or `"held_out"`, see `stdlib_files`.

    Returns:
        One row per file, in the order of `stdlib_files`: `text` (the whole source) and `path`
        (the path inside the library, with forward slashes).

    Raises:
        FileNotFoundError: if this Python has no standard library sources on disk.
    """
    root = _stdlib_root()
    texts: list[str] = []
    paths: list[str] = []
    for path in stdlib_files(split):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
            paths.append(path.relative_to(root).as_posix())
    return Dataset.from_dict({"text": texts, "path": paths})
