"""One process per run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from saelens_matryoshka.files.locks import alone

LOCK = ".lock"


def is_locked(folder: Path) -> bool:
    """Whether a live process holds a run's folder. Of a lock that this user may not open, nobody can tell."""
    if not (folder / LOCK).exists():
        return False
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which exists, for this process alone: see `alone`.

    Raises:
        ValueError: another process holds it, or it cannot be made.
    """
    in_use = ValueError(
        f"{str(folder)!r} is in use: another process is training in it. Wait for it, or stop it; or "
        "choose another --name."
    )
    with alone(folder / LOCK, in_use):
        yield
