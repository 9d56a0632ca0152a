"""Presets: settings that go with a model, as YAML files in the folder `presets`.

A preset holds what differs from the recommended settings. `extends` names a preset that it starts from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelens_matryoshka.runs.fields import Given, did_you_mean
from saelens_matryoshka.runs.settings import merge, parse_yaml

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """One preset, with what it extends."""

    name: str
    description: str
    settings: dict[str, Given]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {key: given.value for key, given in self.settings.items()}
        return {"name": self.name, "description": self.description, **values}


def preset_names() -> list[str]:
    """Every preset, the small ones first, then by model."""
    small = ("tiny", "quick")
    names = sorted((path.stem for path in FOLDER.glob("*.yaml")), key=_numbers_by_size)
    return [name for name in small if name in names] + [name for name in names if name not in small]


def _numbers_by_size(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def load_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ValueError: there is none of that name.
    """
    names = preset_names()
    if name not in names:
        close = did_you_mean(name, names)
        raise ValueError(f"--preset {name!r} is not known{close} `saelens-matryoshka presets` lists them.")
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    settings = parse_yaml(text, f"preset {name}")
    description = settings.pop("description").value
    if (extended := settings.pop("extends", None)) is not None:
        settings = merge([load_preset(extended.value).settings, settings])
    return Preset(name, description, settings)
