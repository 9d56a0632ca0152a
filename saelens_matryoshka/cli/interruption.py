"""Ctrl-C and SIGTERM in a command: it cleans up, says in a line what has become of its work, and ends;
the same command, or `train --resume`, goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from saelens_matryoshka.cli.output import Console

NOTHING_WRITTEN = "Nothing has been written: call it again."


class _Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that what is half-written is removed before the process ends."""


@contextmanager
def interruptible(said: str | Callable[[], str]) -> Iterator[None]:
    """Around a command: an interruption is told in a line, and the exit code is 130 or 143.

    Args:
        said: What is kept and how to go on, or what tells it when the interruption comes.
    """
    rank = os.environ.get("RANK")  # torchrun has started this process, and ends it: one of them speaks
    listens = rank is None and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if listens else None
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        told = said if isinstance(said, str) else said()
        say_why_it_ends(f"Interrupted. {told}")
        raise typer.Exit(128 + number) from None
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def told_to_call_again() -> Iterator[None]:
    """Within, what stops with its state kept says that the same command goes on."""
    from saelens_matryoshka.stopping import RunStopped

    try:
        yield
    except RunStopped as stopped:
        again = shlex.join(["saelens-matryoshka", *sys.argv[1:]])
        say_why_it_ends(f"{stopped}\nTo go on, the same again: {again}")
        raise typer.Exit(stopped.exit_code) from None


@contextmanager
def told_how_to_go_on(folder: Path) -> Iterator[None]:
    """Within, a run that stops says with which command it goes on, and one that has not begun says so."""
    from saelens_matryoshka.runs.folder import RunFolder
    from saelens_matryoshka.runs.layers import runs_in
    from saelens_matryoshka.stopping import RunStopped

    go_on = f"To go on: saelens-matryoshka train --resume {shlex.quote(str(folder))}"

    def what_is_kept(otherwise: str = NOTHING_WRITTEN) -> str:
        return go_on if RunFolder(folder).is_run() or runs_in(folder) else otherwise

    try:
        with interruptible(what_is_kept):
            yield
    except RunStopped as stopped:
        kept = what_is_kept(f"{folder} is not there any more: from where it was moved to, --resume goes on.")
        say_why_it_ends(f"{stopped}\n{kept}")
        raise typer.Exit(stopped.exit_code) from None


def say_why_it_ends(said: str) -> None:
    """Below what is on the terminal, by one process of a job."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(f"\n{said}", markup=False, soft_wrap=True)


def going_on(what: str, console: Console) -> Callable[[int], None]:
    """What says, once a run has been found fit to go on, after which step it does."""

    def say(n_steps: int) -> None:
        where = f"after step {n_steps:,}" if n_steps else "from its start: it has no checkpoint"
        console.print(f"[bold]Going on[/] with {escape(what)}, {where}", soft_wrap=True)

    return say


def _terminate(number: int, frame: Any) -> None:  # noqa: ARG001
    raise _Terminated
