"""What the user is told of an error is what the error says, whatever it quotes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import datasets
import pytest
import torch
import typer
from safetensors.torch import save_file

from saelens_matryoshka import cli
from saelens_matryoshka.cli.output import Console, message
from saelens_matryoshka.cli.train import told_how_to_go_on
from saelens_matryoshka.stopping import RunStopped

QUOTED = ["shape [3, 4] does not fit", "C:\\[/] x", "a\\[bold]b", "[/bold]"]


@pytest.mark.parametrize("said", QUOTED)
def test_an_error_is_told_word_for_word(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise ValueError(said)

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: {said}\n"


def test_what_the_terminal_cannot_show_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the C locale, and on Windows where the output goes to a file."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))

    def failing() -> None:
        Console().print("ln2.hook_normalized → größe")
        raise ValueError("größe \udcff")

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit):
        cli.main()
    for stream, said in ((sys.stdout, b"ln2.hook_normalized ? gr??e\n"), (sys.stderr, b"error: gr??e ?\n")):
        stream.flush()
        assert stream.buffer.getvalue() == said  # type: ignore[attr-defined]


def test_a_full_disk_is_told_by_the_writer_of_weights_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", lambda: save_file({"a": torch.zeros(1)}, tmp_path / "missing" / "file"))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: Error while serializing: ")


def test_a_path_or_a_command_is_told_whole_however_long_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal divides a long word as well, but what is copied from there is in one piece."""
    monkeypatch.setenv("COLUMNS", "80")
    path = str(tmp_path / "/".join(["folder"] * 30) / "cfg.json")
    command = "pip install " + " ".join(["package"] * 20)

    def failing() -> None:
        Console().print(f"written: {path}, 3 MB")
        raise ValueError(
            f"{path} is not JSON, and that is all there is to say of what lies in this folder. Try:\n"
            f"  {command}"
        )

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr()
    assert told.out == f"written: {path}, 3 MB\n"
    assert told.err.splitlines() == [
        "error:",
        path,
        "is not JSON, and that is all there is to say of what lies in this folder. Try:",
        f"  {command}",
    ]


def test_a_dataset_that_cannot_be_looked_for_is_named_with_what_to_do() -> None:
    with pytest.raises(ConnectionError) as raised:
        datasets.load_dataset("user/nothing")
    said = message(raised.value)
    assert said.startswith("dataset 'user/nothing' is no folder here, and the Hugging Face hub cannot be")
    assert ".jsonl" in said


@pytest.mark.parametrize("said", QUOTED)
def test_why_a_run_stopped_is_told_word_for_word(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results/x").mkdir(parents=True)
    Path("results/x/config.yaml").write_text("started_at: then\n")
    with pytest.raises(typer.Exit), told_how_to_go_on(Path("results/x")):
        raise RunStopped(said)
    told = capsys.readouterr()
    assert f"\n{said}\nTo go on: saelens-matryoshka train --resume results/x\n" in told.err
    assert not told.out


def test_a_run_whose_folder_is_gone_is_not_said_to_go_on_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), told_how_to_go_on(tmp_path / "x"):
        raise RunStopped("no such file")
    told = capsys.readouterr().err
    assert "x is not there any more" in told
    assert "To go on" not in told
