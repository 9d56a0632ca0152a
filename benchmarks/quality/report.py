"""What the measurements say: the table, the aims, the plot."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.quality.measure import Row
from saelens_matryoshka.evaluation.plots import Curve, Quantity, panel, require_plotting

RIVAL_AIM = 1.05
DEAD_AIM = 0.10

_TASKS = {"sae": "SAE", "transcoder": "transcoder", "skip_transcoder": "skip transcoder"}


@dataclass(frozen=True)
class Spread:
    """A number of each seed."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if nothing was measured."""
        measured = tuple(value for value in values if value is not None)
        return cls(measured) if measured else None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    def show(self, template: str) -> str:
        """The mean, and with several seeds the standard deviation."""
        shown = template.format(self.mean)
        if len(self.values) > 1:
            shown += "±" + template.format(statistics.stdev(self.values))
        return shown


@dataclass(frozen=True)
class Line:
    """One prefix of one contestant over all seeds."""

    task: str
    contestant: str
    width: int
    rows: tuple[Row, ...]
    vs_rival: Spread | None
    """FVU over that of its fair rival of the same seed; only for a nested contestant of ours"""

    def spread(self, number: Callable[[Row], float | None]) -> Spread | None:
        """A number of every seed."""
        return Spread.of(number(row) for row in self.rows)


@dataclass(frozen=True)
class Aim:
    """A ratio or share that should not exceed a limit."""

    task: str
    what: str
    value: Spread
    limit: float

    @property
    def met(self) -> bool:
        """On the mean over the seeds."""
        return self.value.mean <= self.limit


def lines(rows: list[Row]) -> list[Line]:
    """Rows gathered over the seeds, in the order in which the contestants first appear."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    rivals: dict[tuple[str, str, int, int], float] = {}
    for row in rows:
        groups.setdefault((row.task, row.contestant, row.width), []).append(row)
        if row.rival_of is not None:
            rivals[row.task, row.rival_of, row.width, row.seed] = row.fvu
    found: list[Line] = []
    for (task, contestant, width), members in groups.items():
        ratios = [
            row.fvu / rivals[key] for row in members if (key := (task, contestant, width, row.seed)) in rivals
        ]
        found.append(Line(task, contestant, width, tuple(members), Spread.of(ratios)))
    return found


def aims(gathered: list[Line]) -> list[Aim]:
    """What a nested dictionary of ours should reach: see the limits above and in each aim."""
    found: list[Aim] = []
    for line in gathered:
        if line.vs_rival is None:
            continue
        what = f"FVU at width {line.width:,} / its fair rival's"
        found.append(Aim(line.task, what, line.vs_rival, RIVAL_AIM))
        full = max(other.width for other in gathered if _same(other, line))
        if line.width != full:
            continue
        for other in gathered:
            is_peer = other.contestant.startswith(("sparsify", "dictionary_learning", "stock"))
            if is_peer and other.task == line.task and other.width == full:
                ratio = _ratio(line, other)
                if ratio is not None:
                    found.append(Aim(line.task, f"FVU, full width / {other.contestant}", ratio, 1.0))
        dead = line.spread(lambda row: row.dead)
        if dead is not None:
            found.append(Aim(line.task, "dead latents, full width", dead, DEAD_AIM))
    return found


def _same(one: Line, other: Line) -> bool:
    return (one.task, one.contestant) == (other.task, other.contestant)


def _ratio(line: Line, other: Line) -> Spread | None:
    by_seed = {row.seed: row.fvu for row in other.rows}
    return Spread.of(row.fvu / by_seed[row.seed] for row in line.rows if row.seed in by_seed)


# ---- tables

_HEADINGS = ("width", "L0", "FVU", "/ rival", "dead", "CE rec.\n(zero)", "CE rec.\n(mean)")


def _cells(line: Line) -> list[str]:
    def mean(number: Callable[[Row], float | None], template: str) -> str:
        spread = line.spread(number)
        return "" if spread is None else template.format(spread.mean)

    fvu = line.spread(lambda row: row.fvu)
    return [
        f"{line.width:,}",
        mean(lambda row: row.l0, "{:.1f}"),
        "" if fvu is None else fvu.show("{:.4f}"),
        "" if line.vs_rival is None else line.vs_rival.show("{:.3f}"),
        mean(lambda row: row.dead, "{:.1%}"),
        mean(lambda row: row.ce_recovered, "{:.1%}"),
        mean(lambda row: row.ce_recovered_mean, "{:.1%}"),
    ]


def _chosen(line: Line) -> str:
    """What was chosen for it, of every seed if they differ."""
    return "; ".join(dict.fromkeys(row.settings for row in line.rows))


def tables(gathered: list[Line]) -> list[Table]:
    """One table per task, and one of the aims, for rich."""
    made: list[Table] = []
    for task in dict.fromkeys(line.task for line in gathered):
        table = Table(title=_TASKS[task], box=box.SIMPLE_HEAD, padding=0)
        table.add_column("contestant", overflow="fold")
        for heading in _HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for _, members in itertools.groupby(
            (line for line in gathered if line.task == task), key=lambda line: line.contestant
        ):
            block = list(members)
            name = f"{block[0].contestant}\n[dim]{_chosen(block[0])}"
            cells = ["\n".join(column) for column in zip(*map(_cells, block), strict=True)]
            table.add_row(name, *cells, end_section=True)
        made.append(table)
    summary = Table("task", "what", title="aims", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("value", "at most", "met"):
        summary.add_column(heading, justify="right", no_wrap=True)
    for aim in aims(gathered):
        summary.add_row(*_aim_cells(aim))
    return [*made, summary]


def _aim_cells(aim: Aim) -> list[str]:
    template = "{:.1%}" if aim.limit == DEAD_AIM else "{:.3f}"
    met = "yes" if aim.met else "no"
    return [_TASKS[aim.task], aim.what, aim.value.show(template), template.format(aim.limit), met]


def markdown(gathered: list[Line]) -> str:
    """The same tables as Markdown."""
    parts: list[str] = []
    headings = ["contestant", *(heading.replace("\n", " ") for heading in _HEADINGS), "chosen"]
    for task in dict.fromkeys(line.task for line in gathered):
        body = [[line.contestant, *_cells(line), _chosen(line)] for line in gathered if line.task == task]
        parts.append(f"### {_TASKS[task]}\n\n" + _markdown_table(headings, body, n_left=1))
    body = [_aim_cells(aim) for aim in aims(gathered)]
    headings = ["task", "what", "value", "at most", "met"]
    parts.append("### Aims\n\n" + _markdown_table(headings, body, n_left=2))
    return "\n\n".join(parts) + "\n"


def _markdown_table(headings: list[str], body: list[list[str]], n_left: int) -> str:
    rule = ["---" if i < n_left else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rule, *body])


# ---- plot


def plot(gathered: list[Line], path: Path) -> None:
    """FVU and CE recovered against width, and FVU against L0, a column per task.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_plotting(path)
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line.task for line in gathered))
    figure = Figure(figsize=(4.6 * len(tasks), 10), layout="constrained")
    axes = figure.subplots(3, len(tasks), squeeze=False)
    panels: list[tuple[Quantity, Quantity]] = [("width", "fvu"), ("width", "ce_recovered"), ("l0", "fvu")]
    for column, task in zip(axes.T, tasks, strict=True):
        curves = _curves([line for line in gathered if line.task == task])
        for ax, (x, y) in zip(column, panels, strict=True):
            panel(ax, curves, x, y)
        column[0].set_title(_TASKS[task])
        column[0].legend(fontsize="x-small", frameon=False)
    figure.savefig(path, dpi=130)


def _curves(members: list[Line]) -> list[Curve]:
    """A curve per contestant, ours last, so that it lies on top."""
    names = list(dict.fromkeys(line.contestant for line in members))

    def mean(line: Line, number: Callable[[Row], float | None]) -> float | None:
        spread = line.spread(number)
        return None if spread is None else spread.mean

    found: list[Curve] = []
    for name in names:
        own = [line for line in members if line.contestant == name]
        ours = name.startswith("matryoshka_")
        found.append(
            Curve(
                "ours" if ours else name,
                [line.width for line in own],
                [mean(line, lambda row: row.l0) for line in own],
                [mean(line, lambda row: row.fvu) for line in own],
                [mean(line, lambda row: row.ce_recovered_mean) for line in own],
                emphasised=ours,
            )
        )
    return sorted(found, key=lambda curve: curve.emphasised)
