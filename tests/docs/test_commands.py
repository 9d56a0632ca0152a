"""Every command that the README and the guides show is one that the command line takes."""

from __future__ import annotations

from typing import Any

import pytest
import typer.main

from saelens_matryoshka.cli import app
from saelens_matryoshka.seams import parse_runner_config
from tests.docs.pages import PAGES, Command, commands

SHOWN = [command for page in PAGES for command in commands(page)]


def _parse(arguments: list[str]) -> None:
    """What the command line does with its arguments, up to calling the command."""
    group: Any = typer.main.get_command(app)
    name, rest = arguments[0], arguments[1:]
    assert name in group.commands, f"there is no command {name!r}"
    if "--help" in rest:
        return
    context = group.commands[name].make_context(name, list(rest))
    if name == "train":
        parse_runner_config(context.args)


def test_the_pages_show_commands() -> None:
    assert len(SHOWN) > 30
    assert {command.page for command in SHOWN} >= {"README.md", "docs/quickstart.md", "docs/recipes.md"}


@pytest.mark.parametrize("command", SHOWN, ids=lambda command: f"{command.page}: {command.line[:60]}")
def test_a_shown_command_is_taken_by_the_command_line(command: Command) -> None:
    _parse(command.arguments)


@pytest.mark.parametrize(
    "arguments", [["evaluate", "x"], ["eval"], ["eval", "x", "--width", "3"], ["demo", "--k", "many"]]
)
def test_a_command_that_does_not_exist_would_be_found(arguments: list[str]) -> None:
    with pytest.raises(
        (AssertionError, SystemExit, Exception), match=r"there is no|[Mm]issing|[Nn]o such|valid"
    ):
        _parse(arguments)
