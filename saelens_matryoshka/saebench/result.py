"""What SAEBench gave, per eval and prefix: numbers, JSON and a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.saebench.evals import EVALS

_COLUMNS = 5  # prefixes side by side, so that a table fits into 80 columns


@dataclass(frozen=True)
class PrefixEval:
    """One of SAEBench's evals of one prefix."""

    eval: str
    width: int
    """latents in the prefix"""
    space: str
    """"input" for an SAE; "output" for a transcoder, whose target is replaced, probed and projected on"""
    l0: float | None
    """active latents per token of the texts of this eval; None if it was skipped"""
    metrics: dict[str, float | None]
    """SAEBench's metrics by its own names; `core` has SAELens's `explained_variance` and SAEBench's as
    `saebench_explained_variance`. None where SAEBench's formula divides by zero."""
    skipped: str | None = None
    """why the prefix cannot be evaluated so"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PrefixEval:
        """From `to_dict`, or a result's file."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class SAEBenchResult:
    """SAEBench's evals of every prefix of one SAE or transcoder."""

    model_name: str
    """the language model"""
    hook_name: str
    """hook the SAE reads"""
    hook_name_out: str
    """hook it predicts"""
    folder: Path
    """where the files of the results are"""
    evals: list[PrefixEval] = field(default_factory=list)

    def __getitem__(self, key: tuple[str, int]) -> PrefixEval:
        """`result["core", 64]`: an eval of a prefix."""
        for item in self.evals:
            if (item.eval, item.width) == key:
                return item
        raise KeyError(key)

    @property
    def widths(self) -> list[int]:
        """Prefixes, narrowest first."""
        return sorted({item.width for item in self.evals})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model_name": self.model_name,
            "hook_name": self.hook_name,
            "hook_name_out": self.hook_name_out,
            "evals": [item.to_dict() for item in self.evals],
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON, with null for NaN."""
        return dumps(self.to_dict(), indent=2)

    def table(self) -> Group:
        """Figures by eval, prefixes side by side, each under the L0 it was had at; for rich."""
        hooks = self.hook_name
        if self.hook_name_out != self.hook_name:
            hooks += f" → {self.hook_name_out}"
        notes = [
            f"{item.eval}, prefix {item.width:,}: {item.skipped}." for item in self.evals if item.skipped
        ]
        if any(item.space == "output" for item in self.evals):
            notes.insert(0, "space: output, i.e. the transcoder's target")
        widths = self.widths
        parts = [widths[i : i + _COLUMNS] for i in range(0, len(widths), _COLUMNS)]
        return Group(Text(f"SAEBench, {hooks}"), *map(self._table, parts), *map(Text, notes))

    def _table(self, widths: list[int]) -> Table:
        table = Table()
        table.add_column("prefix", overflow="fold")
        for width in widths:
            table.add_column(f"{width:,}", justify="right", no_wrap=True)
        for name in [name for name in EVALS if any(item.eval == name for item in self.evals)]:
            items = {item.width: item for item in self.evals if item.eval == name}
            row = [items.get(width) for width in widths]
            table.add_section()
            table.add_row(
                f"[bold]{name}[/]  L0", *("-" if item is None else _number(item.l0, 1) for item in row)
            )
            for metric, heading in EVALS[name].figures.items():
                values = [None if item is None else item.metrics.get(metric) for item in row]
                if any(value is not None for value in values):
                    table.add_row(f"  {heading}", *(_number(value) for value in values))
        return table


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
