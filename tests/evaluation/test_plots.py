from __future__ import annotations

import builtins
import csv
import io
from pathlib import Path
from typing import Any

import pytest

from saelens_matryoshka.evaluation import tables
from saelens_matryoshka.evaluation.plots import Curve, draw, plot, require_plotting
from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics

pytest.importorskip("matplotlib")


def _result(rows: list[tuple[int, float, float, float | None]]) -> EvalResult:
    prefixes = [
        PrefixMetrics(width, fvu, 1 - fvu, 0.9, l0, 2, [], 0.0, 3.0, ce and ce + 0.05, ce, 0.1)
        for width, fvu, l0, ce in rows
    ]
    return EvalResult(prefixes, 5000, 1000, "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out", "raw")


NESTED = _result([(64, 0.45, 4.8, 0.58), (256, 0.29, 10.0, 0.76), (1024, 0.22, 16.5, 0.85)])
PLAIN = _result([(16384, 0.25, 61.0, 0.81)])
BOTH = {"nested": NESTED, "<plain> & simple": PLAIN}


def test_every_prefix_is_drawn_against_width_and_l0() -> None:
    figure = draw([Curve.of(name, result) for name, result in BOTH.items()])
    drawn = {}
    for ax in figure.axes:
        for line in ax.get_lines():
            x, y = ([float(value) for value in data] for data in line.get_data())
            drawn[line.get_label(), ax.get_xlabel().split(",")[0], ax.get_ylim()[0] == 0] = (x, y)
    assert drawn["nested", "latents in the prefix", True] == ([64, 256, 1024], [0.45, 0.29, 0.22])
    assert drawn["nested", "L0", True] == ([4.8, 10.0, 16.5], [0.45, 0.29, 0.22])
    assert drawn["nested", "L0", False] == ([4.8, 10.0, 16.5], [0.58, 0.76, 0.85])
    assert drawn["<plain> & simple", "latents in the prefix", True] == ([16384], [0.25])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["nested", "<plain> & simple"]


def test_without_cross_entropy_there_is_no_panel_for_it() -> None:
    figure = draw([Curve.of("one", _result([(64, 0.4, 5.0, None), (128, 0.3, 8.0, None)]))])
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "latents in the prefix",
        "L0, active latents per token",
    ]
    assert not figure.legends


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_suffix_says_the_format(suffix: str, begins: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"plot{suffix}"
    plot(BOTH, path)
    assert path.read_bytes().startswith(begins)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_page_is_self_contained_and_has_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    plot(BOTH, path)
    page = path.read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert "<script" not in page
    assert "&lt;plain&gt; &amp; simple" in page
    assert "<plain>" not in page
    assert page.count("<tr>") == 1 + 4
    assert "<td>0.2200</td>" in page


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--plot .*plot.jpeg.*\.png"):
        require_plotting(tmp_path / "plot.jpeg")
    with pytest.raises(ValueError, match=r"--table .*table.xlsx.*\.csv"):
        tables.require_table(tmp_path / "table.xlsx")


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        require_plotting(Path("plot.png"))


def test_the_csv_has_the_numbers_themselves() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(BOTH))))
    assert [row["model"] for row in rows] == ["nested"] * 3 + ["<plain> & simple"]
    assert float(rows[1]["fvu"]) == 0.29
    assert float(rows[1]["dead_fraction"]) == 2 / 256


def test_the_markdown_has_a_row_per_prefix() -> None:
    lines = tables.markdown({"a | b": NESTED}).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith(r"| a \| b | 64 | 0.4500 | 4.8 | 3.1% | 63.0% | 58.0% |")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {9}
