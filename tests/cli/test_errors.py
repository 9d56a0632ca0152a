"""What the user is told of an error is what the error says, whatever it quotes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console

from saelens_matryoshka import cli
from saelens_matryoshka.cli.train import told_how_to_go_on
from saelens_matryoshka.stopping import RunStopped

QUOTED = ["shape [3, 4] does not fit", "C:\\[/] x", "a\\[bold]b", "[/bold]"]


@pytest.mark.parametrize("message", QUOTED)
def test_an_error_is_told_word_for_word(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise ValueError(message)

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("message", QUOTED)
def test_why_a_run_stopped_is_told_word_for_word(message: str) -> None:
    told = io.StringIO()
    with pytest.raises(typer.Exit), told_how_to_go_on(Path("results/x"), Console(file=told)):
        raise RunStopped(message)
    assert f"\n{message}\nTo go on: saelens-matryoshka train --resume results/x\n" in told.getvalue()
