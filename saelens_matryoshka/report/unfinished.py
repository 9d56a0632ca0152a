"""The state of a collection that has not come to its end, beside the folder where its samples will be.

It is written every few minutes, and when a signal asks to stop; whole or not at all, so that SIGKILL costs no
more than these minutes. With it the same call goes on, and ends with the samples it would have had, to the
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
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saelens_matryoshka.report.collector import Collector
from saelens_matryoshka.report.store import differences
from saelens_matryoshka.runs.keeper import RunStopped
from saelens_matryoshka.runs.signals import StopRequest

_SECONDS = 180.0
_FORMAT = 1


class Unfinished:
    """One file, `FOLDER.unfinished`.

    Args:
        folder: Where the samples will be.
        settings: All that the state depends on; one of others is not gone on with.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder.with_name(f"{folder.name}.unfinished")
        self.settings = json.loads(json.dumps({**settings, "format": _FORMAT}))
        self.seconds = 0.0
        """that the collection had taken up to the state that was loaded"""

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
        """What `Collector.restore` takes; None if there is none of these settings that can be read."""
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
    def kept(self) -> Iterator[Callable[[Collector], None]]:
        """Within, what is to be called between two batches: it saves the state when that is due.

        SIGINT and SIGTERM are remembered until then.

        Raises:
            RunStopped: a signal asked for it; the state is saved.
        """
        started = saved_at = time.monotonic()
        with StopRequest().listening() as stop:

            def look(collector: Collector) -> None:
                nonlocal saved_at
                now = time.monotonic()
                if stop.number is None and now - saved_at < _SECONDS:
                    return
                self._save(collector, self.seconds + now - started)
                saved_at = time.monotonic()
                if stop.number is not None:
                    raise RunStopped(
                        f"Stopped after {collector.n_seen:,} tokens, as asked; they are kept in {self.path}.",
                        exit_code=128 + stop.number,
                    )

            yield look

    def remove(self) -> None:
        """Of no more use, with what a process has left that was killed while it wrote."""
        for path in (self.path, *self.path.parent.glob(f".{self.path.name}.*")):
            path.unlink(missing_ok=True)

    def _save(self, collector: Collector, seconds: float) -> None:
        about = {"settings": self.settings, "n_seen": collector.n_seen, "seconds": seconds}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            save_file(collector.state(), aside, metadata={"about": json.dumps(about)})
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)

    def _about(self) -> dict[str, Any]:
        with safe_open(self.path, "pt") as file:
            return json.loads((file.metadata() or {})["about"])
