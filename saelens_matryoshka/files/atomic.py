"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

_NAME_CHARACTERS = 50
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none, in a folder that is made if need be; text as UTF-8 with Unix line ends."""
    with whole_file(path) as new:
        new.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes its place once all is written, in a folder that is made if need be.

    The place of a link is that of the file it leads to.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _aside(path, "new")
    try:
        yield new
        with new.open("r+b") as file:
            os.fsync(file.fileno())  # or a power cut may leave an empty file under the name
        os.replace(new, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(new)):
            raise
        # A full disk names no file, and other faults the hidden one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its place under its name once all is written, or disappears.

    Raises:
        FileExistsError: under that name is a file, or a folder that is not empty and not to be overwritten.
        OSError: it cannot be written, such as on a full disk; the message names it.
    """
    folder = Path(os.path.realpath(folder))
    _require_room(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = _aside(folder, "new")
    new.mkdir()
    try:
        yield new
        _require_room(folder, overwrite)
        if folder.exists():  # Windows renames over no folder, not even over an empty one
            old = _aside(folder, "old")
            try:
                os.replace(folder, old)
                os.replace(new, folder)
            except BaseException:
                if old.exists() and not folder.exists():
                    os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)  # the new one is in its place
        else:
            os.replace(new, folder)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # a full disk names no file
    except SafetensorError as error:  # which a full disk is, too
        if "while serializing" not in str(error):
            raise
        raise OSError(f"{folder} was not written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def obstacle(path: Path) -> str | None:
    """Why nothing can be made at a path: a file, or a read-only folder, above it; None if neither is."""
    above = next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists())
    if not above.is_dir():
        return f"{above} is a file"
    return None if os.access(above, os.W_OK) else f"{above} is read-only"


def is_left_aside(path: Path) -> bool:
    """Whether it is what a process has left here that was killed while it wrote."""
    return _ASIDE.fullmatch(path.name) is not None


def _require_room(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder, or move that one away.")


def _aside(path: Path, which: Literal["new", "old"]) -> Path:
    """A new name beside a path, from which people see what it is, if it is left there. (What `tempfile` makes
    is readable to its owner only.)"""
    name = path.name[:_NAME_CHARACTERS]  # of a long one the beginning: the new one must not be too long
    return path.with_name(f".{name}.{which}.{uuid.uuid4().hex}")
