"""The curves of a run's log, for its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelens_matryoshka.runs.recorded import is_number, read_lines

_CURVES = ("loss", "fvu", "l0", "dead", "threshold", "lr")
_MAX_POINTS = 600


def read_log(path: Path) -> dict[str, Any] | None:
    """The curves of a `metrics.jsonl`, thinned to some hundred points; None if there is none.

    Returns:
        `tokens` and each curve as lists of equal length, `fvu_per_prefix` as a list per width; None where a
        step has no such value. Of a step that was logged twice, after a resume, the later line counts.

    Raises:
        ValueError: a line is damaged, see `read_lines`.
    """
    rows = {line["tokens"]: line for line in read_lines(path)}
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
    if not is_number(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
