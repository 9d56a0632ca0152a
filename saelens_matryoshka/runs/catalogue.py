"""The runs below a folder: what each is, how far it is, and how good it became."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from saelens_matryoshka.runs.fields import short_number
from saelens_matryoshka.runs.folder import RunFolder
from saelens_matryoshka.runs.lock import is_locked
from saelens_matryoshka.runs.recorded import is_number, read_evaluation, read_lines
from saelens_matryoshka.upkeep.checkpoints import Checkpoints

_PREFIX_METRICS = ("width", "fvu", "l0", "dead_fraction", "ce_recovered", "kl")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, from the files in its folder."""

    folder: str
    model: str
    mapping: str
    name: str
    architecture: str | None = None
    status: Literal["running", "interrupted", "done", "damaged"]
    started_at: str = ""
    completed_at: str | None = None
    d_sae: int | None = None
    k: float | None = None
    tokens: int = 0
    """trained on so far"""
    training_tokens: int | None = None
    """to train on"""
    evaluated: bool = False
    """whether the metrics are those of held-out text; else they are of the last logged batch"""
    prefixes: list[dict[str, Any]] = field(default_factory=list)
    """by width, the narrowest first: width, fvu, l0, dead_fraction, ce_recovered, kl; None where unknown"""
    fault: str | None = None
    """what of it cannot be read, if it is damaged: its metrics, then there are none here; or its config.yaml,
    then there are no settings either"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_runs(root: Path) -> list[Run]:
    """Every run below a folder, by model and mapping, the oldest first.

    Raises:
        ValueError: there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder. Runs are kept in `results`, or where --out says.")
    runs = [_read(folder) or _without_settings(folder) for folder in _run_folders(root)]
    return sorted(runs, key=lambda run: (run.model, run.mapping, run.started_at, run.folder))


def _run_folders(root: Path) -> Iterator[RunFolder]:
    for path, subfolders, names in os.walk(root):
        folder = RunFolder(Path(path))
        if "config.yaml" in names and (folder.is_run() or folder.metrics_log.name in names):
            subfolders.clear()  # W&B and checkpoints keep files of that name too
            yield folder


def _without_settings(folder: RunFolder) -> Run:
    """A run whose config.yaml is damaged: what its place says."""
    path = Path(os.path.abspath(folder.path))
    return Run(
        folder=str(folder.path),
        model=path.parent.parent.name,
        mapping=path.parent.name,
        name=path.name,
        status="damaged",
        fault=f"{folder.config} has not the settings that `train` writes.",
    )


def _read(folder: RunFolder) -> Run | None:
    """The run; None if its config.yaml is damaged."""
    if not folder.is_run():
        return None
    config, path = folder.read(), Path(os.path.abspath(folder.path))  # "." has no name
    parent = path.parent
    lockstep = bool(config.get("lockstep"))
    tokens, evaluated, prefixes, fault = 0, False, [], None
    if config.get("completed_at"):
        status = "done"
    else:
        held = parent if lockstep else folder.path
        status = "running" if is_locked(held) else "interrupted"
        newest = next(iter(Checkpoints(RunFolder(held).checkpoints).paths()), None)
        tokens = 0 if newest is None else int(newest.name)  # the log has only every so many steps
    try:
        log, evaluation = read_lines(folder.metrics_log), read_evaluation(folder.path)
        evaluated = evaluation is not None
        prefixes = _logged(log, folder.metrics_log) if evaluation is None else _evaluated(evaluation)
        tokens = max(tokens, log[-1]["tokens"] if log else 0)
    except ValueError as error:
        status, fault = "damaged", str(error)
    try:
        run = Run(
            folder=str(folder.path),
            model=config["model_name"],
            mapping=f"{parent.parent.name}/{parent.name}" if lockstep else parent.name,
            name=path.name,
            architecture=config["architecture"],
            status=status,
            started_at=str(config["started_at"]),
            completed_at=config.get("completed_at"),
            d_sae=config["d_sae"],
            k=config["k"],
            tokens=tokens,
            training_tokens=config["training_tokens"],
            evaluated=evaluated,
            prefixes=prefixes,
            fault=fault,
        )
    except KeyError:
        return None
    return run if _is_sound(run) else None


def _is_sound(run: Run) -> bool:
    """Whether texts and numbers are where they are expected."""
    texts = [run.model, run.architecture, run.started_at]
    numbers = [run.d_sae, run.k, run.training_tokens]
    return all(map(is_number, numbers)) and all(isinstance(one, str) for one in texts)


def _evaluated(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in _PREFIX_METRICS} for row in evaluation["prefixes"]]


def _logged(log: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if not log:
        return []
    last, unknown = log[-1], dict.fromkeys(_PREFIX_METRICS)
    try:
        rows = [{**unknown, "width": int(width), "fvu": fvu} for width, fvu in last["fvu_per_prefix"].items()]
        rows[-1] |= {"l0": last["l0"], "dead_fraction": last["dead"]}
        sound = all(value is None or is_number(value) for row in rows for value in row.values())
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: its last line has other metrics than `train` writes.")
    return rows


def runs_table(runs: list[Run], *, prefixes: bool = False) -> Table:
    """The runs as a table, for rich; reads well at 80 columns.

    Args:
        runs: As `find_runs` gives them.
        prefixes: A row for every prefix, and not for the whole dictionary alone.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    # 12: "first 1024" in one piece; 6: all of it in 60 columns
    table.add_column("run", overflow="fold", min_width=12 if prefixes else 6)
    table.add_column("status", no_wrap=True)
    for heading in ("tokens", "FVU", "L0", "dead", "CE rec.\nzero"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (model, mapping), group in groupby(runs, key=lambda run: (run.model, run.mapping)):
        table.add_row(Text(f"{model} · {mapping}", "bold"))
        for run in group:
            shown = run.prefixes if prefixes else run.prefixes[-1:]
            whole = _metrics(shown[-1], run.evaluated) if shown else ["-"] * 4
            table.add_row(Text(run.name), run.status, _tokens(run), *whole)
            for row in shown[-2::-1]:
                table.add_row(f"  first {row['width']:,}", "", "", *_metrics(row, run.evaluated))
        table.add_section()
    notes = [f"damaged: {run.fault}" for run in runs if run.fault is not None]
    if any(run.prefixes and not run.evaluated for run in runs):
        notes.append("~ of the last logged batch, not of held-out text")
    if notes:
        table.caption, table.caption_justify = Text("\n".join(notes)), "left"
    return table


def _metrics(row: dict[str, Any], evaluated: bool) -> list[str]:
    formats = {"fvu": "{:.3f}", "l0": "{:.1f}", "dead_fraction": "{:.1%}", "ce_recovered": "{:.1%}"}
    fvu, *others = ["-" if row[name] is None else form.format(row[name]) for name, form in formats.items()]
    return [fvu if evaluated else f"~{fvu}", *others]


def _tokens(run: Run) -> str:
    if run.status == "done":
        return short_number(run.tokens)
    if run.training_tokens is None:
        return "-"
    return f"{short_number(run.tokens)}/{short_number(run.training_tokens)}"
