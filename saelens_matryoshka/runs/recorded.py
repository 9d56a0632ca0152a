"""What a run has recorded, read back: the lines of its log, and the evaluation of its prefixes.

Either may have been written by another tool, cut short, or damaged: what is returned can be relied on.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVALUATIONS = ("metrics.json", "evaluation.json")
"""files that may hold the evaluation of a model, beside it: `train` writes the first, `export` the second"""
_ALWAYS = frozenset({"width", "fvu", "l0", "dead_fraction"})
_NUMBERS = (*_ALWAYS, "cosine", "ce", "ce_recovered", "ce_recovered_mean", "kl")
"""of a prefix"""
_TOTALS = ("n_tokens", "n_ce_tokens", "ce_clean", "ce_zero", "ce_mean")
"""of all prefixes together"""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none if there is no log. A last line cut short by a crash is left out.

    Raises:
        ValueError: another line is no JSON object with its `tokens`.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _json(line)
        if not isinstance(row, dict) or not is_number(row.get("tokens")):
            if number == len(lines):
                break  # the run was killed while it wrote
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with its tokens, not {line[:60]!r}. Mend the "
                "line, or remove it."
            )
        rows.append(row)
    return rows


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of every prefix of the model in a folder, as `eval --json` writes it.

    Returns:
        `EvalResult.to_dict()`, with None for what is no finite number; None if there is no evaluation.

    Raises:
        ValueError: the file is something else.
    """
    for path in (folder / name for name in EVALUATIONS):
        if not path.is_file():
            continue
        found = _json(path.read_text(encoding="utf-8", errors="replace"))
        if not _is_evaluation(found):
            command = shlex.join(["eval", str(folder), "--json", str(path)])
            raise ValueError(f"{path} is no evaluation: write one with `{command}`.")
        return found
    return None


def is_number(value: Any) -> bool:
    """Whether it is a finite number of a size that can be reckoned with."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_evaluation(found: Any) -> bool:
    rows = found.get("prefixes") if isinstance(found, dict) else None
    return (
        isinstance(rows, list) and bool(rows) and _has_numbers(found, _TOTALS) and all(map(_is_prefix, rows))
    )


def _is_prefix(row: Any) -> bool:
    if not isinstance(row, dict) or not row.keys() >= _ALWAYS or not isinstance(row["width"], int):
        return False
    return row["width"] > 0 and _has_numbers(row, _NUMBERS)


def _has_numbers(values: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether what is known of them are numbers."""
    return all(values.get(name) is None or is_number(values[name]) for name in names)


def _json(text: str) -> Any:
    """What a text holds, None for NaN and infinity, which are no JSON; None if it is no JSON at all."""
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
