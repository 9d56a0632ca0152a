"""Files by which one process at a time does something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

_SECONDS = 0.3
"""longer than a look at who holds a lock, which itself takes it for an instant"""


@contextmanager
def alone(file: Path, in_use: Exception) -> Iterator[None]:
    """Hold a lock file, in a folder that exists, for this process alone.

    The lock is the operating system's: it goes with the process, however that ends. The file stays.

    Args:
        file: Which is made.
        in_use: Raised if another process holds it.

    Raises:
        ValueError: it cannot be made.
    """
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=_SECONDS, poll_interval=0.01)
    except filelock.Timeout:
        raise in_use from None
    except (OSError, NotImplementedError) as error:
        raise ValueError(
            f"{str(file.parent)!r} cannot be locked ({getattr(error, 'strerror', None) or error}): choose a "
            "folder that can be written into."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_at(place: Path, in_use: Exception) -> Iterator[None]:
    """Hold a folder, there yet or not, for this process alone, by a lock file beside it: see `alone`."""
    place = Path(os.path.realpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    with alone(place.with_name(f".{place.name}.lock"), in_use):
        yield
