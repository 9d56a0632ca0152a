"""What a run has recorded: the metrics of its steps, and the evaluation of its prefixes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_CURVES = ("loss", "fvu", "l0", "dead", "threshold", "lr")
_MAX_POINTS = 600


def read_log(path: Path) -> dict[str, Any] | None:
    """The curves of a `metrics.jsonl`, thinned to some hundred points; None if there is none.

    Returns:
        `tokens` and each curve as lists of equal length, `fvu_per_prefix` as a list per width; None where a
        step has no such value. Of a step that was logged twice, after a resume, the later line counts.

    Raises:
        ValueError: a line is no JSON object with its `tokens`. A last line that is cut off is left out.
    """
    if not path.is_file():
        return None
    rows: dict[float, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tokens = _number(row["tokens"])
        except (ValueError, TypeError, KeyError):
            tokens = None
        if tokens is None:
            if number == len(lines):
                break  # the run was killed while it wrote
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with its tokens, not {line[:60]!r}."
            )
        rows[tokens] = row
    if not rows:
        return None
    kept = _thinned(sorted(rows))
    widths = sorted({width for tokens in kept for width in _prefixes(rows[tokens])}, key=int)
    return {
        "tokens": kept,
        **{name: [_number(rows[tokens].get(name)) for tokens in kept] for name in _CURVES},
        "fvu_per_prefix": {
            width: [_number(_prefixes(rows[tokens]).get(width)) for tokens in kept] for width in widths
        },
    }


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of every prefix in a run's folder, as `eval --json` writes it; None if there is none.

    Raises:
        ValueError: the file is something else.
    """
    for name in ("metrics.json", "evaluation.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            widths = [int(row["width"]) for row in found["prefixes"]]
            complete = all({"fvu", "l0", "dead_fraction", "cosine"} <= set(row) for row in found["prefixes"])
        except (ValueError, TypeError, KeyError):
            widths, complete = [], False
        if not widths or not complete:
            raise ValueError(f"{path} is no evaluation: write one with `eval {folder} --json {path}`.")
        return found
    return None


def _thinned(tokens: list[float]) -> list[float]:
    if len(tokens) <= _MAX_POINTS:
        return tokens
    step = (len(tokens) - 1) / (_MAX_POINTS - 1)
    return [tokens[round(i * step)] for i in range(_MAX_POINTS)]


def _prefixes(row: dict[str, Any]) -> dict[str, Any]:
    found = row.get("fvu_per_prefix")
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    """None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
