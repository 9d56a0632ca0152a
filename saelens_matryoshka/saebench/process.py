"""The process SAEBench runs in: its random states, its working directory, and what is cached."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from saelens_matryoshka.files.locks import alone


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A new folder in `out` for what is needed while SAEBench runs, removed in the end.

    So is what a killed process has left there; what others are at work in stays.
    """
    for left in filter(Path.is_dir, out.glob(".running-*")):
        with contextlib.suppress(_InUseError), _held(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = out / f".running-{uuid.uuid4().hex}"
    with _held(folder):  # before it is there, or another process could take it for one that was left
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _InUseError(Exception):
    """Another process is at work there."""


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = folder.with_name(f"{folder.name}.lock")
    with alone(lock, _InUseError()):
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows removes no file that is open
                lock.unlink()


@contextmanager
def complete_cache(folder: Path) -> Iterator[Path]:
    """A cache folder without what an interrupted run has left half-written, for this process alone.

    Another that wants the same folder waits, and then finds it complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder
        mark_complete(folder)


def mark_complete(folder: Path) -> None:
    """Say that all of the language model's own part is there."""
    (folder / "complete").touch()


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def unchanged_process(tokenizer: Any, scratch: Path, seed: int) -> Iterator[None]:
    """What SAEBench leaves behind, undone: random states, gradient mode, tokenizer, working directory.

    SAEBench writes to `artifacts/` in the working directory, so it runs in the scratch folder.
    """
    sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side")}
    states = random.getstate(), np.random.get_state(), torch.is_grad_enabled(), Path.cwd()
    try:
        with torch.random.fork_rng():
            seed_everything(seed)
            os.chdir(scratch)
            yield
    finally:
        python, numpy_state, grad_enabled, folder = states
        os.chdir(folder)
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_grad_enabled(grad_enabled)
        for name, side in sides.items():
            setattr(tokenizer, name, side)
