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

_MOST_FAILURES = 10


@contextmanager
def wandb_cannot_stop_it(*names: str) -> Iterator[None]:
    """Within, an error of one of W&B's functions is a warning.

    The first error is told; after ten in a row, it is not tried again.

    Args:
        names: Of the functions. Default: `log` and `log_artifact`, which `wandb.init` makes: to be entered
            after that.
    """
    with ExitStack() as patches:
        for name in names or ("log", "log_artifact"):
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
                    f"wandb.{name}: {type(error).__name__}: {error} The run goes on.{gives_up}", stacklevel=2
                )
            return None
        failures = 0
        return result

    return guarded
