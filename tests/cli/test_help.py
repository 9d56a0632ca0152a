"""The help of every command, and what all commands have in common."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from sae_lens import __version__ as sae_lens_version
from typer.testing import CliRunner

import saelens_matryoshka
from saelens_matryoshka.cli import app
from saelens_matryoshka.cli.output import Console as Terminal
from saelens_matryoshka.cli.output import token_progress, with_json_targets
from tests.forked import command, run_command, start
from tests.formats.hub_cache import hub_cache  # noqa: F401

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _help(*words: str) -> str:
    said = CliRunner().invoke(app, [*words], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert said.exit_code == 0
    return said.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples_and_json_and_fits_80_columns(name: str) -> None:
    said = _help(name, "-h")
    assert said == _help(name, "--help")
    assert f"saelens-matryoshka {name}" in said
    assert "--json" in said
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said, "a word that is cut"


def test_help_tells_a_newcomer_what_to_type_first_and_lists_every_command() -> None:
    said = _help("--help")
    assert said.index("saelens-matryoshka train --preset tiny") < said.index("Options")
    assert all(f" {name} " in said for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["eval", "--no-such-flag"]]
)
def test_what_needs_no_torch_does_not_wait_for_it(words: list[str]) -> None:
    program = [sys.executable, "-X", "importtime", "-m", "saelens_matryoshka", *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "sae_lens"}


def test_prose_of_the_help_is_as_wide_as_the_terminal() -> None:
    lines = [line.strip() for line in _help("cache", "--help").splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("Which model"))
    prose = lines[start : lines.index("", start)]
    for line, following in pairwise(prose):  # no line breaks before it must
        assert len(line) + 1 + len(following.split()[0]) > 78


def test_version_names_the_package_and_saelens() -> None:
    assert _help("--version").split() == [
        "saelens-matryoshka",
        f"{saelens_matryoshka.__version__},",
        "SAELens",
        sae_lens_version,
    ]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("runs --json", "runs --json -"),
        ("runs --json results", "runs --json - results"),
        ("runs --json -", "runs --json -"),
        ("eval run --json out.json --tokens 5", "eval run --json out.json --tokens 5"),
        ("train --json --preset tiny", "train --json - --preset tiny"),
        ("eval run --json=out", "eval run --json=out"),
        ("", ""),
    ],
)
def test_json_alone_means_standard_output(given: str, read: str) -> None:
    assert with_json_targets(given.split()) == read.split()


def test_presets_do_not_fold_a_model_into_a_column_of_letters() -> None:
    said = CliRunner().invoke(app, ["presets"], env={"COLUMNS": "60", "TERMINAL_WIDTH": "60"}).output
    assert "gpt2" in next(line for line in said.splitlines() if line.startswith("quick"))


def test_a_terminal_too_narrow_for_a_table_wraps_its_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for heading in ("status", "tokens", "FVU", "CE rec.\nzero"):
        table.add_column(heading, no_wrap=True)
    table.add_row("12288-k64", "interrupted", "6.14k/4M", "~1.027", "100.0%")
    shown = io.StringIO()
    terminal = Terminal(file=shown)
    terminal.print(Group("a sentence that is longer than forty columns", table))
    said = shown.getvalue()
    assert all(word in said for word in ("12288-k", "interrupted", "6.14k/4M", "~1.027", "CE rec.", "100.0%"))
    assert "…" not in said
    assert said.startswith("a sentence that is longer than forty \ncolumns\n")
    assert terminal.width == 40


def test_presets_as_json_alone_and_in_a_file_beside_the_table(tmp_path: Path) -> None:
    presets = json.loads(_help("presets", "--json"))
    assert json.loads(_help("presets", "--json", "tiny")) == [presets[0]]
    out = tmp_path / "presets.json"
    assert "gemma-2-2b" in _help("presets", "--json", str(out))
    assert json.loads(out.read_text()) == presets


def test_a_reader_that_closes_the_pipe_ends_the_command_in_silence(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with (tmp_path / "errors").open("w+") as errors:
        process = start(command, "presets", "--json", cwd=tmp_path, out=writing, err=errors.fileno())
        process.join()
        os.close(writing)
        assert process.exitcode == 1
        assert errors.read() == ""


@pytest.mark.slow
def test_a_model_that_is_not_in_the_cache_of_a_machine_without_a_network(
    tmp_path: Path,
    hub_cache: Path,  # noqa: F811, ARG001
) -> None:
    done = run_command("train", "--preset", "quick", cwd=tmp_path)
    said = " ".join(done.stderr.split())
    assert done.returncode == 1
    assert "error: the Hugging Face hub cannot be reached" in said
    assert "HF_HOME" in said
    assert "Traceback" not in said
    assert not (tmp_path / "results").exists()


def test_the_bar_of_long_work_says_what_how_fast_and_how_long_still() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    with token_progress(console) as on_progress:
        on_progress("reconstruction", 400, 400)
        for done in (20, 40, 60):
            time.sleep(0.01)
            on_progress("cross-entropy", done, 100)
    said = shown.getvalue()
    assert "cross-entropy" in said
    assert "tokens/s" in said
