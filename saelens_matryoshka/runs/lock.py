"""One process per run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

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
    """Hold a run's folder, which exists, for this process alone.

    The lock is the operating system's: it goes with the process, however that ends. The file stays.

    Raises:
        ValueError: another process holds it, or it cannot be made.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(
            f"{str(folder)!r} is in use: another process is training in it. Wait for it, or stop it; or "
            "choose another --name."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise ValueError(
            f"{str(folder)!r} cannot be locked ({getattr(error, 'strerror', None) or error}): a run needs a "
            "folder that it can write into."
        ) from None
    try:
        yield
    finally:
        lock.release()
