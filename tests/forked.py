"""The command line in a process of its own, forked from this one.

In a fresh process SAELens is imported anew, which takes longer than what most tests do there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch

from saelens_matryoshka.cli import main

_FORK = multiprocessing.get_context("fork")


def run_command(*arguments: str, cwd: Path) -> CompletedProcess[str]:
    """`saelens-matryoshka ARGUMENTS` in a folder, on a terminal of 80 columns."""
    return run_function(command, *arguments, cwd=cwd, env={"COLUMNS": "80"})


def run_function(
    function: Callable[..., Any], *arguments: Any, cwd: Path, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """`function(*arguments)` in a process of its own: its exit code, and what it prints."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(function, *arguments, cwd=cwd, out=out.fileno(), err=err.fileno(), env=env)
        process.join()
        assert process.exitcode is not None
        out.seek(0)
        err.seek(0)
        return CompletedProcess(arguments, process.exitcode, out.read(), err.read())


def start(
    function: Callable[..., Any],
    *arguments: Any,
    cwd: Path,
    out: int,
    err: int,
    env: Mapping[str, str] | None = None,
) -> BaseProcess:
    """`function(*arguments)` in a process of its own that prints to these files."""
    process = _FORK.Process(target=_work, args=(function, arguments, cwd, out, err, dict(env or {})))
    process.start()
    return process


def command(*arguments: str) -> None:
    """The command line, in this process."""
    sys.argv = ["saelens-matryoshka", *arguments]
    main()


def _work(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    cwd: Path,
    out: int,
    err: int,
    env: dict[str, str],
) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    # in place of those that gather what a test prints
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # OpenMP's threads are not forked
    os.chdir(cwd)
    os.environ |= env
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
