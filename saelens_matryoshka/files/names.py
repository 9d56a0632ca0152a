"""Names of files and folders: those that every system takes, and the order that people expect."""

from __future__ import annotations

import re

_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_reserved(name: str) -> bool:
    """Whether Windows keeps a name for a device."""
    return _DEVICE.fullmatch(name) is not None


def unreserved(name: str) -> str:
    """The name, with an underscore behind if it is reserved."""
    return f"{name}_" if is_reserved(name) else name


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer_10 comes after layer_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
