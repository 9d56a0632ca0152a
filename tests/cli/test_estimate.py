from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from saelens_matryoshka.cli import main
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
    ("text", "n_bytes"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 << 30), ("16g", 16 * 10**9), ("1.5TB", 15 * 10**11)],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert read_size("--gpu-memory", text) == n_bytes


@pytest.mark.parametrize("text", ["much", "-3GB", "3XB", "1.2.3GB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--gpu-memory .* is no size: write e.g. 24GB"):
        read_size("--gpu-memory", text)
