"""What an evaluation returns: numbers per prefix, what they were measured on, a table and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from saelens_matryoshka.evaluation.metrics import DENSITY_EDGES
from saelens_matryoshka.files.valid_json import dumps

T = TypeVar("T")
_OF_CE = frozenset({"ce", "kl", "ce_clean", "ce_zero", "ce_mean"})
"""None where no cross-entropy was measured, and only there"""
_COLUMNS = (
    # heading, attribute, how it is shown
    ("width", "width", "{:,}"),
    ("FVU", "fvu", "{:.3f}"),
    ("cosine", "cosine", "{:.3f}"),
    ("L0", "l0", "{:.1f}"),
    ("dead", "dead_fraction", "{:.1%}"),
)
_CE_COLUMNS = (
    ("CE", "ce", "{:.3f}"),
    ("CE rec.\nzero", "ce_recovered", "{:.1%}"),
    ("CE rec.\nmean", "ce_recovered_mean", "{:.1%}"),
    ("KL", "kl", "{:.3f}"),
)
_UNLIMITED = 1000
"""columns of a terminal that every table fits in"""


@dataclass(frozen=True)
class PrefixMetrics:
    """Metrics of one prefix, as the inference (JumpReLU) model, on held-out tokens."""

    width: int
    """latents in the prefix"""
    fvu: float
    """Σ‖y - ŷ‖² / Σ‖y - ȳ‖²; 0 is perfect, predicting the mean scores 1"""
    explained_variance: float
    """SAELens's calculation of 1 - FVU"""
    cosine: float
    """mean over tokens of the cosine between target and prediction"""
    l0: float
    """active latents per token"""
    n_dead: int
    """latents that never fired on these tokens"""
    density: list[int]
    """live latents by the log10 of the share of tokens they fire on, per interval of `density_edges`"""
    decoder_redundancy: float | None
    """share of latents with another decoder row of the prefix at a cosine above 0.9; None where it was not
    asked for, as during training, or the dictionary is in shards, each of which would need all rows"""
    ce: float | None
    """cross-entropy of the language model with the prefix's output in place of the target, nats"""
    ce_recovered: float | None
    """(CE_zero - CE) / (CE_zero - CE_clean), the target zero-ablated"""
    ce_recovered_mean: float | None
    """the same against mean ablation of the target"""
    kl: float | None
    """KL(clean ‖ with the prefix's output) of the next token, nats"""

    @property
    def dead_fraction(self) -> float:
        """Share of the prefix's latents that never fired on these tokens."""
        return self.n_dead / self.width


@dataclass(frozen=True)
class EvalResult:
    """Metrics of every prefix of one SAE or transcoder.

    `prefixes` has a `PrefixMetrics` for each, the narrowest first: width, fvu, l0, dead_fraction,
    ce_recovered, kl and more. `table()` is for `rich.print`, `to_json()` for a file.
    """

    prefixes: list[PrefixMetrics]
    """narrowest first"""
    n_tokens: int
    """tokens behind fvu, l0 and n_dead; excluded tokens are not among them"""
    n_ce_tokens: int
    """next-token predictions behind ce and kl"""
    hook_name: str
    """hook the model reads"""
    hook_name_out: str
    """hook it predicts, and replaces"""
    input_frame: str
    """frame of the source, see `saelens_matryoshka.sites.norm_frame`"""
    train_l0: float | None = None
    """k the model was trained with, where its metadata say so; compare with the last prefix's l0"""
    ce_clean: float | None = None
    """cross-entropy of the language model untouched, nats"""
    ce_zero: float | None = None
    """with the target replaced by zeros"""
    ce_mean: float | None = None
    """with the target replaced by its mean over the evaluated tokens"""
    density_edges: list[float] = field(default_factory=lambda: list(DENSITY_EDGES))
    """log10 of the shares of tokens between which `density` counts"""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with the derived dead_fraction."""
        result = dataclasses.asdict(self)
        for row, prefix in zip(result["prefixes"], self.prefixes, strict=True):
            row["dead_fraction"] = prefix.dead_fraction
        return result

    def to_json(self) -> str:
        """`to_dict` as indented JSON, with null for NaN."""
        return dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> EvalResult:
        """What `to_json` gave, NaN where a number that was measured is null.

            result = sm.EvalResult.from_json(Path("results/tiny/mlp-2/first/metrics.json").read_text())

        Args:
            text: Of a run's metrics.json, or of what `eval --json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            record = json.loads(text)
            with_ce = record["n_ce_tokens"] > 0
            rows = [_from_dict(PrefixMetrics, row, with_ce=with_ce) for row in record["prefixes"]]
            return _from_dict(cls, {**record, "prefixes": rows}, with_ce=with_ce)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"text is not what EvalResult.to_json gives: {reason}.") from None

    def table(self) -> Table:
        """One row per prefix, for rich; fits 80 columns."""
        hooks = dict.fromkeys((self.hook_name, self.hook_name_out))  # an SAE's are one
        table = metrics_table(self, " → ".join(hooks))
        caption = f"{self.n_tokens:,} tokens"
        if self.ce_clean is not None:
            caption += (
                f"; CE clean {self.ce_clean:.3f}, zero-ablated {self.ce_zero:.3f}, "
                f"mean-ablated {self.ce_mean:.3f} nats on {self.n_ce_tokens:,} of them"
            )
        if self.train_l0:
            l0 = self.prefixes[-1].l0
            caption += (
                f"; L0 {l0:.1f} is {l0 / self.train_l0 - 1:+.1%} against k = {self.train_l0:g} in training"
            )
        table.caption = caption
        return table


def _from_dict(kind: type[T], record: dict[str, Any], *, with_ce: bool) -> T:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    measured = {one.name for one in fields if one.type == "float"} | (_OF_CE if with_ce else set())
    values = {one.name: record[one.name] for one in fields}
    missing = {name: math.nan for name in measured & values.keys() if values[name] is None}
    return kind(**values | missing)


class _Numbers(Table):
    """A table whose columns move together on a narrow terminal, where rich would cut the figures."""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        padding, self.padding = self.padding, 0  # which it can do without
        try:
            return super().__rich_measure__(console, options)
        finally:
            self.padding = padding

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = super().__rich_measure__(console, options.update(width=_UNLIMITED)).maximum
        padding = self.padding
        if wanted > options.max_width:
            self.padding = 0
        try:
            yield from super().__rich_console__(console, options)
        finally:
            self.padding = padding


def metrics_table(result: EvalResult, title: str = "") -> Table:
    """A row per prefix, for rich."""
    columns = _COLUMNS + (() if result.ce_clean is None else _CE_COLUMNS)
    table = _Numbers(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for prefix in result.prefixes:
        cells = [(getattr(prefix, name), form) for _, name, form in columns]
        table.add_row(*("-" if value is None else form.format(value) for value, form in cells))
    return table
