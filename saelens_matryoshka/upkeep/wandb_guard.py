"""Weights & Biases must not end a run: what it cannot take is told, and training goes on.

W&B itself keeps what it could not send, retries, and `wandb sync` sends it later; an error that comes through
to the caller is one that retrying would not mend.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import wandb

_FUNCTIONS = ("log", "log_artifact")
_MOST_FAILURES = 10


@contextmanager
def wandb_cannot_stop_it() -> Iterator[None]:
    """Within, an error of `wandb.log` or `wandb.log_artifact` is a warning. To be entered after `wandb.init`.

    The first error is told; after ten in a row, it is not tried again.
    """
    with ExitStack() as patches:
        for name in _FUNCTIONS:
            guarded = _guarded(name, getattr(wandb, name))
            patches.enter_context(mock.patch.object(wandb, name, guarded))
        yield


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    failures = 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if failures >= _MOST_FAILURES:
            return None
        try:
            result = function(*args, **kwargs)
        except Exception as error:  # whatever it is, the run is worth more
            failures += 1
            if failures in (1, _MOST_FAILURES):
                gives_up = " It is not tried again." if failures == _MOST_FAILURES else ""
                warnings.warn(
                    f"wandb.{name}: {type(error).__name__}: {error} Training goes on.{gives_up}", stacklevel=2
                )
            return None
        failures = 0
        return result

    return guarded
