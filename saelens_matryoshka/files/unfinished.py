"""The state of work that has not come to its end: a pass over text, of which little is kept.

It is written every few minutes, and when a signal asks to stop; whole or not at all, so that SIGKILL costs no
more than these minutes. With it the same call goes on, and ends with the result it would have had, to the
last bit.
"""

from __future__ import annotations

import contextlib
import glob
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saelens_matryoshka.files.atomic import whole_file
from saelens_matryoshka.files.fingerprint import differences, hash_of
from saelens_matryoshka.stopping import RunStopped, StopRequest

_SECONDS = 180.0
_FORMAT = 1
_UNREADABLE = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError)
"""what reading a file of something else may raise"""


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

    def __init__(self, result: Path | str, settings: Mapping[str, Any]) -> None:
        result = Path(result)
        self.path = result.with_name(f"{result.name}.unfinished")
        self.settings = json.loads(json.dumps({**settings, "format": _FORMAT}))
        self.seconds = 0.0
        """that the work had taken up to the state that was loaded"""
        self._others: list[Path] = []

    @classmethod
    def in_cache(cls, name: str, of: Any, settings: Mapping[str, Any]) -> Unfinished:
        """Of a result that has no place of its own: in the user's cache, where the hub's files are too.

        Several at once, of other settings, each have their own file. What others of the same have left is
        of no more use once one of them has come to its end, and goes with it.

        Args:
            name: What the file's name begins with.
            of: What tells results that have nothing to do with each other, such as the models' paths.
            settings: All that the state depends on.
        """
        kept = cls(_cache() / f"{name}-{hash_of(of)[:16]}-{hash_of(settings)[:16]}", settings)
        same = kept.path.parent.glob(f"{name}-{hash_of(of)[:16]}-*.unfinished")
        kept._others = sorted(set(same) - {kept.path})
        return kept

    def found(self) -> str | None:
        """In words, what is there and what becomes of it; None if there is nothing."""
        path = next((path for path in (self.path, *self._others) if path.exists()), None)
        if path is None:
            return None
        try:
            about = _about(path)
            if said := differences(about["settings"], self.settings):
                return f"{path} is of other settings ({said}): starting anew."
            return f"Going on with {path}, after {about['n_seen']:,} tokens."
        except _UNREADABLE:
            return f"{path} cannot be read: starting anew."

    def load(self) -> dict[str, torch.Tensor] | None:
        """The state that was kept; None if there is none of these settings that can be read."""
        try:
            about = _about(self.path)
            if differences(about["settings"], self.settings):
                return None
            with safe_open(self.path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.seconds = float(about["seconds"])
        except _UNREADABLE:
            return None
        return state

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[Work], None]]:
        """Within, what is to be called between two batches: it saves the state when that is due.

        SIGINT and SIGTERM are remembered until then. A state that cannot be written is told, and does not
        end the work.

        Raises:
            RunStopped: a signal asked for it; the state is saved, or the message says why it is not.
        """
        started = saved_at = time.monotonic()
        with StopRequest().listening() as stop:

            def look(work: Work) -> None:
                nonlocal saved_at
                now = time.monotonic()
                if stop.number is None and now - saved_at < _SECONDS:
                    return
                kept = f"they are kept in {self.path}."
                try:
                    self._save(work, self.seconds + now - started)
                except (OSError, SafetensorError) as error:
                    kept = f"they cannot be kept in {self.path}: {error}"
                    if stop.number is None:
                        warnings.warn(f"After {work.n_seen:,} tokens, {kept}", stacklevel=3)
                saved_at = time.monotonic()
                if stop.number is not None:
                    raise RunStopped(
                        f"Stopped after {work.n_seen:,} tokens, as asked; {kept}",
                        exit_code=128 + stop.number,
                    )

            yield look

    def remove(self) -> None:
        """Of no more use, with what a process has left that was killed while it wrote."""
        for path in (self.path, *self._others):
            for written in (path, *path.parent.glob(f".{glob.escape(path.name)}.*")):
                with contextlib.suppress(OSError):  # another user's, in a cache that is shared
                    written.unlink(missing_ok=True)

    def _save(self, work: Work, seconds: float) -> None:
        about = {"settings": self.settings, "n_seen": work.n_seen, "seconds": seconds}
        with whole_file(self.path) as new:
            save_file(work.state(), new, metadata={"about": json.dumps(about)})


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})["about"])


def _cache() -> Path:
    return Path(constants.HF_ASSETS_CACHE).expanduser() / "saelens_matryoshka"
