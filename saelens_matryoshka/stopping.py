"""SIGINT and SIGTERM as a wish to stop after the step, and the stop itself, from which the work goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RunStopped(RuntimeError):
    """Work has stopped before its end, and can be continued. The message says from where."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """130 after SIGINT and 143 after SIGTERM, as a shell reports processes they end; else 1"""


class StopRequest:
    """Remembers that a signal has come."""

    number: int | None = None
    """of the first signal that came, None so far"""

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Within, SIGINT and SIGTERM are remembered; a second SIGINT interrupts at once.

        Outside of the main thread, where Python delivers no signals, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._remember)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:  # noqa: ARG002
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
