from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelens_matryoshka.report.metrics_files import read_log


def _line(tokens: int, **values: object) -> str:
    return json.dumps({"step": tokens // 10, "tokens": tokens, "loss": 1.0, **values}) + "\n"


def test_a_log_becomes_curves_of_equal_length(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        _line(10, fvu_per_prefix={"8": 0.9, "16": 0.8}, l0=4)
        + _line(20, fvu_per_prefix={"8": 0.7, "16": None}, lr=1e-4, dead=float("nan"))
    )
    log = read_log(path)
    assert log is not None
    assert log["tokens"] == [10, 20]
    assert log["loss"] == [1.0, 1.0]
    assert log["l0"] == [4, None]
    assert log["lr"] == [None, 1e-4]
    assert log["dead"] == [None, None]
    assert log["fvu_per_prefix"] == {"8": [0.9, 0.7], "16": [0.8, None]}


def test_a_long_log_is_thinned_and_keeps_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_line(10 * i) for i in range(1, 5001)))
    log = read_log(path)
    assert log is not None
    assert len(log["tokens"]) == 600
    assert (log["tokens"][0], log["tokens"][-1]) == (10, 50_000)


def test_what_was_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = _line(10) + _line(20, l0=1) + _line(30, l0=1) + _line(20, l0=2) + _line(30, l0=2) + _line(40)
    path.write_text(lines)
    log = read_log(path)
    assert log is not None
    assert log["tokens"] == [10, 20, 30, 40]
    assert log["l0"] == [None, 2, 2, None]


def test_a_last_line_cut_off_is_left_out_and_a_broken_one_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(10) + _line(20)[:-9])
    log = read_log(path)
    assert log is not None
    assert log["tokens"] == [10]
    path.write_text(_line(10) + "[1, 2]\n" + _line(20))
    with pytest.raises(ValueError, match="line 2"):
        read_log(path)


def test_no_log_and_an_empty_one_are_none(tmp_path: Path) -> None:
    assert read_log(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").touch()
    assert read_log(tmp_path / "metrics.jsonl") is None
