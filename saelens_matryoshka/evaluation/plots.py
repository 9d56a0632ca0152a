"""Evaluations as a picture: FVU and CE recovered of every prefix, against its width and against its L0."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.evaluation.tables import COLUMNS, cells
from saelens_matryoshka.files.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf", ".html")

Quantity = Literal["width", "l0", "fvu", "ce_recovered"]
_LABELS: dict[Quantity, str] = {
    "width": "latents in the prefix",
    "l0": "L0, active latents per token",
    "fvu": "FVU",
    "ce_recovered": "CE recovered (mean ablation)",
}
# Okabe and Ito's palette, which the colour-blind can tell apart; black is for what is emphasised.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A")
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Curve:
    """The prefixes of one model, narrowest first."""

    name: str
    width: Sequence[float]
    l0: Sequence[float | None]
    fvu: Sequence[float | None]
    ce_recovered: Sequence[float | None]
    emphasised: bool = False

    @classmethod
    def of(cls, name: str, result: EvalResult) -> Curve:
        """From an evaluation."""
        rows = result.prefixes
        return cls(
            name,
            [row.width for row in rows],
            [row.l0 for row in rows],
            [row.fvu for row in rows],
            [row.ce_recovered_mean for row in rows],
        )

    def points(self, x: Quantity, y: Quantity) -> list[tuple[float, float]]:
        """Those prefixes that have both."""
        pairs = zip(getattr(self, x), getattr(self, y), strict=True)
        return sorted((a, b) for a, b in pairs if a is not None and b is not None)


def require_plotting(path: Path) -> None:
    """Check that a plot can be written there, before there is anything to plot.

    Raises:
        ValueError: the suffix is not one of `FORMATS`.
        ImportError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {str(path)!r}: the name must end with {', '.join(FORMATS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("A plot needs matplotlib: pip install matplotlib") from None


def plot(results: Mapping[str, EvalResult], path: Path) -> None:
    """Draw the prefixes of one or several models and write the picture.

    Args:
        results: Evaluations of one target on the same tokens, by the models' names.
        path: .png, .svg, .pdf, or .html for a page of its own with the numbers below the picture.
    """
    require_plotting(path)
    figure = draw([Curve.of(name, result) for name, result in results.items()], _title(results))
    suffix = path.suffix.lower()
    if suffix == ".html":
        write_atomically(path, _page(figure, results))
        return
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix[1:], dpi=160)
    write_atomically(path, picture.getvalue())


def draw(curves: Sequence[Curve], title: str = "") -> Figure:
    """A figure with a panel for each pair of FVU or CE recovered, and width or L0."""
    from matplotlib.figure import Figure

    quantities: tuple[Quantity, ...] = ("fvu", "ce_recovered")
    measured: list[Quantity] = [y for y in quantities if any(curve.points("width", y) for curve in curves)]
    figure = Figure(figsize=(9.6, 0.9 + 3.5 * len(measured)), layout="constrained")
    axes = figure.subplots(len(measured), 2, squeeze=False, sharey="row")
    for row, y in zip(axes, measured, strict=True):
        for ax, x in zip(row, ("width", "l0"), strict=True):
            panel(ax, curves, x, y)
        row[1].set_ylabel("")
    if title:
        figure.suptitle(title, fontsize=11)
    if len(curves) > 1:
        handles, labels = axes[0][0].get_legend_handles_labels()
        columns = min(len(curves), max(1, 100 // max(len(curve.name) + 6 for curve in curves)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def panel(ax: Axes, curves: Sequence[Curve], x: Quantity, y: Quantity) -> None:
    """Draw one quantity against another: a line for a nested model, a marker for a plain one."""
    for i, curve in enumerate(curves):
        points = curve.points(x, y)
        if not points:
            continue
        ax.plot(
            *zip(*points, strict=True),
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=6 if len(points) > 1 else 8,
            linestyle="-" if len(points) > 1 else "none",
            linewidth=2.4 if curve.emphasised else 1.6,
            color="black" if curve.emphasised else _COLOURS[i % len(_COLOURS)],
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=curve.name,
            zorder=3 if curve.emphasised else 2,
        )
    ax.set_xscale("log", base=2)
    _tick(ax, [value for curve in curves for value, _ in curve.points(x, y)], exact=x == "width")
    if y == "fvu":
        ax.set_ylim(bottom=0)
    else:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel(_LABELS[x])
    ax.set_ylabel(_LABELS[y])
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _tick(ax: Axes, values: list[float], *, exact: bool) -> None:
    """Ticks at the widths themselves where they are few and apart, else at powers of two, and between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ticks = sorted(set(values))
    apart = all(b / a >= 1.35 for a, b in pairwise(ticks))
    if exact and apart and len(ticks) <= 7:
        ax.set_xticks(ticks)
    else:
        close = not exact and max(ticks, default=1) < 8 * min(ticks, default=1)
        ax.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5) if close else (1,), numticks=8))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    )


def _title(results: Mapping[str, EvalResult]) -> str:
    first = next(iter(results.values()))
    who = f"{next(iter(results))}: " if len(results) == 1 else ""
    return f"{who}{first.hook_name_out}, {first.n_tokens:,} tokens"


def _page(figure: Figure, results: Mapping[str, EvalResult]) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    heads = "".join(f"<th>{heading}</th>" for heading in ("model", *(column[0] for column in COLUMNS)))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *cells(prefix))) + "</tr>"
        for name, result in results.items()
        for prefix in result.prefixes
    )
    return _PAGE.format(
        title=html.escape(_title(results)), svg=svg[svg.index("<svg") :], heads=heads, rows=rows
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
{svg}
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>
</body></html>
"""
