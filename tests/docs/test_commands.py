"""Every command that the README and the guides show is one that the command line takes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import typer.main

from saelens_matryoshka.cli import app
from saelens_matryoshka.runs.fields import Given
from saelens_matryoshka.runs.mappings import NoModelConfigError
from saelens_matryoshka.runs.presets import load_preset
from saelens_matryoshka.runs.settings import read_flags, resolve
from tests.docs.pages import PAGES, Command, commands

SHOWN = [command for page in PAGES for command in commands(page)]


def _parse(arguments: list[str]) -> None:
    """What the command line does with its arguments, up to calling the command."""
    group: Any = typer.main.get_command(app)
    name, rest = arguments[0], arguments[1:]
    assert name in group.commands, f"there is no command {name!r}"
    if "--help" in rest or "--help-all" in rest:
        return
    context = group.commands[name].make_context(name, list(rest))
    if name in ("train", "estimate") and (context.args or context.params["preset"]):
        _resolve(context)


def _resolve(context: Any) -> None:
    """The settings that a call of `train` or `estimate` describes."""
    own = {name: Given(context.params[name], "flag") for name in ("mapping", "layer") if context.params[name]}
    preset = context.params["preset"]
    below = {} if preset is None else load_preset(preset).settings
    with contextlib.suppress(NoModelConfigError):  # raised when all flags are known
        resolve([below, read_flags(context.args) | own])


def test_the_pages_show_commands() -> None:
    assert len(SHOWN) > 30
    assert {command.page for command in SHOWN} >= {"README.md", "docs/quickstart.md", "docs/recipes.md"}


@pytest.mark.parametrize("command", SHOWN, ids=lambda command: f"{command.page}: {command.line[:60]}")
def test_a_shown_command_is_taken_by_the_command_line(command: Command) -> None:
    _parse(command.arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "x"],
        ["eval"],
        ["eval", "x", "--width", "3"],
        ["demo", "--k", "many"],
        ["train", "--preset", "tiny", "--widht", "3"],
    ],
)
def test_a_command_that_does_not_exist_would_be_found(arguments: list[str]) -> None:
    with pytest.raises(
        (AssertionError, SystemExit, Exception), match=r"there is no|[Mm]issing|[Nn]o such|valid|widht"
    ):
        _parse(arguments)
