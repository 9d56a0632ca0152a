from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saelens_matryoshka.cli import app, main
from saelens_matryoshka.cli.estimate import read_size


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    """Exit code, and what was printed."""
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out + said.err


def test_a_preset_is_estimated_within_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _run(monkeypatch, capsys, "estimate", "--preset", "tiny", "--cpu-memory", "16GB")
    assert code == 0, said
    assert "fits" in said
    assert "Time: " in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_flag_wins_over_the_preset_and_json_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peaks = []
    for d_sae in (1024, 65536):
        out = tmp_path / f"{d_sae}.json"
        code, said = _run(
            monkeypatch, capsys, "estimate", "--preset", "tiny", "--d_sae", d_sae, "--no-time", "--json", out
        )
        assert code == 0, said
        (cpu,) = json.loads(out.read_text())["devices"]
        peaks.append(cpu["parts"]["dictionary"])
    assert peaks[1] / peaks[0] == pytest.approx(64, rel=0.01)


def test_several_layers_are_estimated_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["estimate", "--preset", "tiny", "--no-time", "--json", "-"]
    dictionaries = []
    for flags in (["--layer", "1"], ["--layers", "0-3"]):
        code, said = _run(monkeypatch, capsys, *words, *flags)
        assert code == 0, said
        dictionaries.append(json.loads(said)["devices"][0]["parts"]["dictionary"])
    assert dictionaries[1] == 4 * dictionaries[0]


def test_what_does_not_fit_says_what_helps_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _run(
        monkeypatch, capsys, "estimate", "--preset", "gpt2", "--device", "cuda", "--gpu-memory", "4GB",
        "--cpu-memory", "64GB", "--no-time",
    )  # fmt: skip
    assert code == 1
    assert "does not fit" in said
    assert "It would fit with --" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_gpu_that_is_not_here_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _run(
        monkeypatch, capsys, "estimate", "--preset", "gpt2", "--device", "cuda:7", "--cpu-memory", "64GB",
        "--no-time", "--json", "-",
    )  # fmt: skip
    assert code == 0
    numbers = json.loads(said)
    assert numbers["fits"] is None
    assert numbers["devices"][0]["available_bytes"] is None


@pytest.mark.parametrize(
    ("flags", "processes", "shards"),
    [
        (["--processes", "8"], 8, 1),
        (["--processes", "8", "--shard", "dictionary"], 8, 8),
        (["--processes", "8", "--shard", "dictionary", "--shards", "2"], 8, 2),
    ],
    ids=lambda value: str(value),
)
def test_one_of_many_processes_is_estimated(
    flags: list[str],
    processes: int,
    shards: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["estimate", "--preset", "tiny", "--cpu-memory", "16GB", "--no-time"]
    code, said = _run(monkeypatch, capsys, *words, *flags)
    assert code == 0, said
    has = "a copy" if shards == 1 else f"1/{shards}"
    assert f"Each of {processes} processes, which has {has} of the dictionary, takes:" in said
    assert max(map(len, said.splitlines())) <= 80
    _, said = _run(monkeypatch, capsys, *words, *flags, "--json", "-")
    numbers = json.loads(said)
    assert (numbers["processes"], numbers["shards"]) == (processes, shards)
    found = numbers["devices"][0]["parts"]["dictionary"]
    assert found == pytest.approx(4 * 1024 * (128 + 128 + 1) / shards, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "dictionary"], r"there is one.*--processes 8"),
        (["--shard", "rows", "--processes", "8"], "--shard rows is not known"),
        (["--shards", "2", "--processes", "8"], "give --shard dictionary too"),
        (["--shard", "dictionary", "--shards", "3", "--processes", "8"], "--shards 3 does not divide the 8"),
        (["--layers", "0-3", "--processes", "8"], "in lockstep by one process"),
        (["--processes", "3"], "train_batch_size_tokens=1024 .* among 3"),
    ],
    ids=lambda value: str(value),
)
def test_processes_that_cannot_divide_the_work_are_refused(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["estimate", "--preset", "tiny", "--no-time", *flags])
    assert isinstance(result.exception, ValueError)
    assert re.search(message, str(result.exception))


def test_under_torchrun_the_first_process_shows_the_plan_of_a_shard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [
        "train",
        "--preset",
        "tiny",
        "--shard",
        "dictionary",
        "--out",
        tmp_path,
        "--dry-run",
        "--json",
        "-",
    ]
    monkeypatch.setenv("RANK", "1")
    assert _run(monkeypatch, capsys, *words) == (0, "")
    monkeypatch.setenv("RANK", "0")
    _, said = _run(monkeypatch, capsys, *words)
    assert json.loads(said)["estimate"]["shards"] == 2


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 << 30), ("16g", 16 * 10**9), ("1.5TB", 15 * 10**11)],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert read_size("--gpu-memory", text) == n_bytes


@pytest.mark.parametrize("text", ["much", "-3GB", "3XB", "3iB", "1.2.3GB", ".", "", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--gpu-memory .* is no size: write e.g. 24GB"):
        read_size("--gpu-memory", text)
