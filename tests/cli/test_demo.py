from __future__ import annotations

import json
from pathlib import Path

import pytest
from sae_lens import SAE, JumpReLUTranscoder
from typer.testing import CliRunner

from saelens_matryoshka.cli import app
from tests.forked import run_command


@pytest.mark.slow
def test_demo_trains_evaluates_saves_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_command("demo", "--tokens", "60000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "demo-tiny-layer-2"
    assert "output/demo-tiny-layer-2" in done.stdout
    result = json.loads((folder / "evaluation.json").read_text())
    fvu = [row["fvu"] for row in result["prefixes"]]
    l0 = [row["l0"] for row in result["prefixes"]]
    assert len(fvu) == 4
    assert fvu == sorted(fvu, reverse=True)
    assert l0 == sorted(l0)
    assert fvu[-1] < 0.6
    assert l0[-1] == pytest.approx(16, rel=0.1)
    assert all(0.2 < row["ce_recovered"] < 1 for row in result["prefixes"])
    assert type(SAE.load_from_disk(folder)) is JumpReLUTranscoder
    assert max(map(len, done.stdout.splitlines())) <= 80
    # again with other settings: refused, and nothing lost
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(app, ["demo", "--tokens", "50000"])
    assert isinstance(again.exception, ValueError), again.output
    assert "output_path" in str(again.exception)
    assert json.loads((folder / "evaluation.json").read_text()) == result


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["demo", "--k", "0"], "k=0"),
        (["demo", "--layer", "7"], "layer=7, but the model has 4 layers"),
        (["demo", "--d-sae", "0"], "d_sae=0"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(args: list[str], says: str, tmp_path: Path) -> None:
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_commands(tmp_path: Path) -> None:
    done = run_command("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "train" in done.stdout
