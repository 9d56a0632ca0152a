from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from saelens_matryoshka.runs.recorded import read_evaluation, read_lines


def test_only_a_last_line_may_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    good = json.dumps({"tokens": 9, "loss": 1.0}) + "\n"
    path.write_text(good + "\n" + good + good[:-9])
    assert read_lines(path) == 2 * [{"tokens": 9, "loss": 1.0}]
    for bad in (
        "[1, 2]",
        good[:-9],
        '{"tokens": "nine"}',
        '{"loss": 1}',
        "é".encode("latin-1").decode("latin-1"),
    ):
        path.write_text(good + bad + "\n" + good)
        with pytest.raises(ValueError, match="line 2: expected a JSON object with its tokens"):
            read_lines(path)


ROW = {"width": 8, "fvu": 0.5, "l0": 4.0, "dead_fraction": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"prefixes": []}',
        '{"prefixes": [{"width": 8}]}',
        json.dumps({"prefixes": [ROW], "n_tokens": "many"}),
        json.dumps({"prefixes": [ROW], "ce_zero": [3.0]}),
    ],
)
def test_what_is_no_evaluation_is_named(text: str, tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json is no evaluation"):
        read_evaluation(tmp_path)


def test_the_command_that_mends_an_evaluation_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError) as raised:
        read_evaluation(folder)
    command = str(raised.value).split("`")[1]
    assert shlex.split(command) == ["eval", str(folder), "--json", str(folder / "metrics.json")]


def test_what_is_no_finite_number_is_none(tmp_path: Path) -> None:
    row = '{"width": 8, "fvu": NaN, "l0": -Infinity, "dead_fraction": 1e999, "kl": 0.5}'
    (tmp_path / "evaluation.json").write_text(f'{{"prefixes": [{row}], "ce_clean": Infinity}}')
    assert read_evaluation(tmp_path) == {
        "prefixes": [{"width": 8, "fvu": None, "l0": None, "dead_fraction": None, "kl": 0.5}],
        "ce_clean": None,
    }
