"""Evaluations as tables for documents and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics
from saelens_matryoshka.files.atomic import write_atomically

FORMATS = (".md", ".csv")

COLUMNS: tuple[tuple[str, str, str], ...] = (
    # heading, attribute, how it is shown
    ("width", "width", "{:,}"),
    ("FVU", "fvu", "{:.4f}"),
    ("L0", "l0", "{:.1f}"),
    ("dead", "dead_fraction", "{:.1%}"),
    ("CE recovered (zero)", "ce_recovered", "{:.1%}"),
    ("CE recovered (mean)", "ce_recovered_mean", "{:.1%}"),
    ("KL", "kl", "{:.4f}"),
)


def cells(prefix: PrefixMetrics) -> list[str]:
    """One prefix, in the order of `COLUMNS`."""
    values = [getattr(prefix, name) for _, name, _ in COLUMNS]
    return ["" if v is None else form.format(v) for v, (_, _, form) in zip(values, COLUMNS, strict=True)]


def require_table(path: Path) -> None:
    """Check that a table can be written there.

    Raises:
        ValueError: the suffix is not one of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--table {str(path)!r}: the name must end with {' or '.join(FORMATS)}.")


def write_table(results: Mapping[str, EvalResult], path: Path) -> None:
    """Write the numbers of several models, a row per prefix: .md or .csv."""
    require_table(path)
    text = markdown(results) if path.suffix.lower() == ".md" else comma_separated(results)
    write_atomically(path, text)


def markdown(results: Mapping[str, EvalResult]) -> str:
    """The numbers as a Markdown table, a row per prefix."""
    lines = [
        "| model | " + " | ".join(column[0] for column in COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for name, result in results.items():
        shown = name.replace("|", r"\|")
        lines += [f"| {shown} | " + " | ".join(cells(prefix)) + " |" for prefix in result.prefixes]
    return "\n".join(lines) + "\n"


def comma_separated(results: Mapping[str, EvalResult]) -> str:
    """The numbers at full precision as comma-separated values, a row per prefix."""
    names = [name for _, name, _ in COLUMNS]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["model", *names])
    for name, result in results.items():
        for prefix in result.prefixes:
            out.writerow([name, *(getattr(prefix, column) for column in names)])
    return text.getvalue()
