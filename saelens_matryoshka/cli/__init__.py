"""The command line, `saelens-matryoshka`: thin commands over the package."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from saelens_matryoshka.cli import (
    cache,
    demo,
    describe,
    estimate,
    evaluate,
    formats,
    hooks,
    report,
    runs,
    saebench,
    samples,
    train,
)

app = typer.Typer(
    name="saelens-matryoshka",
    help="Matryoshka SAEs and transcoders for SAELens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    demo,
    train,
    cache,
    runs,
    estimate,
    evaluate,
    samples,
    report,
    saebench,
    describe,
    formats,
    hooks,
):
    command.register(app)


@app.callback()
def _root() -> None:
    """Matryoshka SAEs and transcoders for SAELens."""


def main() -> None:
    """Entry point: what the user can mend is told in a line or two, without a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        told = Text.assemble(("error:", "bold red"), f" {str(error) or type(error).__name__}")
        Console(stderr=True).print(told)
        sys.exit(1)
