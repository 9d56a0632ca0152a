"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none, in a folder that is made if need be; text as UTF-8 with Unix line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # not mkstemp: readable to its owner only
    try:
        if isinstance(content, bytes):
            with temporary.open("xb") as file:
                file.write(content)
        else:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
