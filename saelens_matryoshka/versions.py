"""Which releases of packages something was made with: another may round otherwise."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "saelens-matryoshka",
    "sae-lens",
    "transformer-lens",
    "torch",
    "transformers",
    "datasets",
    "numpy",
)


def package_versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # run from its sources
            found[name] = version(name)
    return found
