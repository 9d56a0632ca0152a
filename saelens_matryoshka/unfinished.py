"""The state of work that has not come to its end: a pass over text, of which little is kept.

It is written every few minutes, and when a signal asks to stop; whole or not at all, so that SIGKILL costs no
more than these minutes. With it the same call goes on, and ends with the result it would have had, to the
last bit.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saelens_matryoshka.fingerprint import differences
from saelens_matryoshka.stopping import RunStopped, StopRequest

_SECONDS = 180.0
_FORMAT = 1


class Work(Protocol):
    """What has a state to keep."""

    n_seen: int
    """tokens so far"""

    def state(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on from here; it is written before anything changes."""
        ...


class Unfinished:
    """One file, `RESULT.unfinished`.

    Args:
        result: Where the result will be, a file or a folder; the state is beside it.
        settings: All that the state depends on; one of others is not gone on with.
    """

    def __init__(self, result: Path, settings: Mapping[str, Any]) -> None:
        self.path = result.with_name(f"{result.name}.unfinished")
        self.settings = json.loads(json.dumps({**settings, "format": _FORMAT}))
        self.seconds = 0.0
        """that the work had taken up to the state that was loaded"""

    def found(self) -> str | None:
        """In words, what is there and what becomes of it; None if there is nothing."""
        if not self.path.exists():
            return None
        try:
            about = self._about()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return f"{self.path} cannot be read: starting anew."
        if said := differences(about["settings"], self.settings):
            return f"{self.path} is of other settings ({said}): starting anew."
        return f"Going on with {self.path}, after {about['n_seen']:,} tokens."

    def load(self) -> dict[str, torch.Tensor] | None:
        """The state that was kept; None if there is none of these settings that can be read."""
        try:
            about = self._about()
            if differences(about["settings"], self.settings):
                return None
            with safe_open(self.path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.seconds = float(about["seconds"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return state

    @contextmanager
    def kept(self) -> Iterator[Callable[[Work], None]]:
        """Within, what is to be called between two batches: it saves the state when that is due.

        SIGINT and SIGTERM are remembered until then.

        Raises:
            RunStopped: a signal asked for it; the state is saved.
        """
        started = saved_at = time.monotonic()
        with StopRequest().listening() as stop:

            def look(work: Work) -> None:
                nonlocal saved_at
                now = time.monotonic()
                if stop.number is None and now - saved_at < _SECONDS:
                    return
                self._save(work, self.seconds + now - started)
                saved_at = time.monotonic()
                if stop.number is not None:
                    raise RunStopped(
                        f"Stopped after {work.n_seen:,} tokens, as asked; they are kept in {self.path}.",
                        exit_code=128 + stop.number,
                    )

            yield look

    def remove(self) -> None:
        """Of no more use, with what a process has left that was killed while it wrote."""
        for path in (self.path, *self.path.parent.glob(f".{self.path.name}.*")):
            path.unlink(missing_ok=True)

    def _save(self, work: Work, seconds: float) -> None:
        about = {"settings": self.settings, "n_seen": work.n_seen, "seconds": seconds}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            save_file(work.state(), aside, metadata={"about": json.dumps(about)})
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)

    def _about(self) -> dict[str, Any]:
        with safe_open(self.path, "pt") as file:
            return json.loads((file.metadata() or {})["about"])
