"""Descriptions of latents, with their scores, kept in a folder."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from saelens_matryoshka.files.atomic import write_atomically

_SETTINGS, _LATENTS = "settings.json", "latents.jsonl"


@dataclass(frozen=True)
class Description:
    """What a chat model says a latent fires on, and how well it finds it again from that."""

    latent: int
    text: str
    """the description"""
    fires: list[bool]
    """in which of the scored passages the latent fires"""
    detected: list[bool] | None
    """in which the chat model, knowing the description, said it does; None if its answer could not be read"""

    @property
    def accuracy(self) -> float | None:
        """Share of the passages that were said right. Most are random ones, so saying "none" scores high."""
        if self.detected is None:
            return None
        return sum(a == b for a, b in zip(self.fires, self.detected, strict=True)) / len(self.fires)

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean of the shares said right where it fires and where it does not: guessing scores 0.5."""
        if self.detected is None:
            return None
        shares = []
        for value in (True, False):
            said = [b for a, b in zip(self.fires, self.detected, strict=True) if a is value]
            if said:
                shares.append(sum(b is value for b in said) / len(said))
        return sum(shares) / len(shares)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the scores."""
        scores = {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy}
        return {**dataclasses.asdict(self), **scores}


@dataclass
class Descriptions:
    """All descriptions of one model in a folder, added to as they come, from several threads too."""

    folder: Path
    settings: dict[str, Any]
    """what they were made with; others in the same folder are refused"""
    widths: list[int]
    """cumulative widths of the levels"""
    by_latent: dict[int, Description] = field(default_factory=dict)
    _prepared: bool = field(default=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, settings: Mapping[str, Any], widths: list[int]) -> Descriptions:
        """Those that the folder has.

        Raises:
            ValueError: They were made with other settings.
        """
        folder = Path(folder)
        found = cls(folder, dict(settings), widths)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out={str(folder)!r} is a file: name a folder.")
        if (folder / _SETTINGS).exists():
            before = json.loads((folder / _SETTINGS).read_text())
            now = json.loads(json.dumps(found.settings))
            other = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
            if other:
                raise ValueError(
                    f"out={str(folder)!r} has descriptions that were made with another {', '.join(other)}: "
                    "choose another folder, or move that one away."
                )
        if (folder / _LATENTS).exists():
            for line in (folder / _LATENTS).read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that was being written when the run was stopped
                    continue
                kept = {name: row[name] for name in ("latent", "text", "fires", "detected")}
                found.by_latent[row["latent"]] = Description(**kept)
        return found

    def _prepare(self) -> None:
        """Make the folder, and say in it what the descriptions are made with."""
        if self._prepared:
            return
        write_atomically(self.folder / _SETTINGS, json.dumps(self.settings, indent=2) + "\n")
        path = self.folder / _LATENTS
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:
                file.write("\n")
        self._prepared = True

    def add(self, description: Description) -> None:
        """Write one down."""
        with self._lock:
            self._prepare()
            with (self.folder / _LATENTS).open("a") as file:
                file.write(json.dumps(description.to_dict()) + "\n")
            self.by_latent[description.latent] = description

    def table(self) -> Table:
        """Mean scores of every level, for rich; fits 80 columns."""
        table = Table(title="Detection of latents from their descriptions", box=box.SIMPLE_HEAD)
        for heading in ("latents", "described", "accuracy", "balanced accuracy"):
            table.add_column(heading, justify="right", no_wrap=True)
        lower = 0
        for width in self.widths:
            here = [self.by_latent[latent] for latent in sorted(self.by_latent) if lower <= latent < width]
            table.add_row(
                f"{lower:,} to {width - 1:,}",
                f"{len(here):,}",
                _mean([one.accuracy for one in here]),
                _mean([one.balanced_accuracy for one in here]),
            )
            lower = width
        fires = [value for one in self.by_latent.values() for value in one.fires]
        silent = 1 - sum(fires) / max(len(fires), 1)
        unread = sum(one.detected is None for one in self.by_latent.values())
        table.caption = f'Always saying "none" scores an accuracy of {silent:.2f}, and 0.50 balanced.' + (
            f" {unread} answers could not be read." if unread else ""
        )
        return table


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"
