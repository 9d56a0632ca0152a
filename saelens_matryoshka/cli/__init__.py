"""The command line, `saelens-matryoshka`: thin commands over the package."""

from __future__ import annotations

import functools
import inspect
import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

import saelens_matryoshka
from saelens_matryoshka.cli import (
    cache,
    demo,
    describe,
    estimate,
    evaluate,
    formats,
    hooks,
    presets,
    report,
    runs,
    saebench,
    samples,
    train,
)
from saelens_matryoshka.cli.output import Console, message, paragraphs, with_json_targets


class _Commands(TyperGroup):
    """The commands, with arguments that Typer cannot describe by itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_json_targets(args))


def _loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command after the imports that take seconds, to which `--help` does not come."""

    @functools.wraps(command)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        saelens_matryoshka.load()
        return command(*args, **kwargs)

    return loaded


app = typer.Typer(
    name="saelens-matryoshka",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for panel, commands in {
    "Train": (demo, train, presets, estimate, runs, cache),
    "Look at what was learned": (evaluate, report, samples, saebench, describe),
    "Exchange with other tools": (formats, hooks),
}.items():
    n_before = len(app.registered_commands)
    for command in commands:
        command.register(app)
    for registered in app.registered_commands[n_before:]:
        assert registered.callback is not None
        registered.rich_help_panel = panel
        registered.help = paragraphs(inspect.getdoc(registered.callback) or "")
        registered.callback = _loading(registered.callback)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"saelens-matryoshka {saelens_matryoshka.__version__}, SAELens {version('sae-lens')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version this is."),
    ] = False,
) -> None:
    """Matryoshka SAEs and transcoders for SAELens.

    A first result, offline, in a minute or two, and its page:

      saelens-matryoshka train --preset tiny --name first
      saelens-matryoshka report results/tiny/mlp-2/first
    """


def main() -> None:
    """Entry point: what the user can mend is told in a line or two, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow is no reason to stop where there is only ASCII
    try:
        app()
    except BrokenPipeError:
        # the reader, such as `head`, has what it wanted; Python would complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError, SafetensorError) as error:
        Console(stderr=True).tell(message(error))
        sys.exit(1)
