"""Nothing lost: what saves the state of a run when it is due, when it is asked to stop, and when it fails."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from saelens_matryoshka.architectures import NonFiniteActivationsError
from saelens_matryoshka.ops import ALONE, Group
from saelens_matryoshka.stopping import RunStopped, StopRequest
from saelens_matryoshka.upkeep.checkpoints import CheckpointError, Checkpoints

T = TypeVar("T")


@dataclass(frozen=True)
class Upkeep:
    """How the state of a run is kept."""

    keep: int = 2
    """checkpoints kept, the newest ones; 0 for all"""
    checkpoint_minutes: float = 15.0
    """between two checkpoints; 0 for none but at SAELens's marks and at the end"""
    skip_bad_batches: int = 0
    """batches of NaN or Inf that are left out before the run stops"""

    def __post_init__(self) -> None:
        for name, kind in (("keep", int), ("checkpoint_minutes", int | float), ("skip_bad_batches", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < float("inf"):
                whole = ", and whole" if kind is int else ""
                raise ValueError(f"--{name.replace('_', '-')} {value} must be a number, 0 or larger{whole}.")


class Keeper:
    """Keeps the checkpoints of a run while it trains. An observer: see `saelens_matryoshka.runner.observe`.

    A checkpoint is written every `minutes`, at SAELens's `n_checkpoints` marks, and after the last step;
    before the run stops because of a signal, or of an error that came between two steps.
    """

    def __init__(self, checkpoints: Checkpoints, *, minutes: float) -> None:
        """What keeps the state of one run.

        Args:
            checkpoints: Where they go.
            minutes: Between two checkpoints; 0 for none but those at SAELens's marks and at the end.
        """
        self.checkpoints, self.seconds = checkpoints, 60 * minutes
        self.stop = StopRequest()
        self.group: Group = ALONE
        """the processes that train together, which save and stop after the same step"""
        self._saved_at = time.monotonic()
        self._complete: int | None = None

    def train(self, trainer: SAETrainer[Any, Any], fit: Callable[[], T]) -> T:
        """Call `fit`, which trains the trainer, and see that nothing is lost.

        Raises:
            RunStopped: a signal or an error has ended it.
        """
        stock_save = trainer.save_checkpoint

        def save_checkpoint(checkpoint_name: str, *args: Any, **kwargs: Any) -> None:
            if checkpoint_name.isdecimal():
                self._save(trainer)
            else:  # "final_…", of folded weights, which nothing continues from
                stock_save(checkpoint_name, *args, **kwargs)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        self._complete = trainer.n_training_samples
        try:
            with self.stop.listening():
                return fit()
        except (RunStopped, KeyboardInterrupt):
            raise
        except CheckpointError as error:
            raise RunStopped(f"Step {trainer.n_training_steps}: {error}") from error
        except NonFiniteActivationsError as error:
            raise RunStopped(f"{error} {self._last()}") from error
        except Exception as error:
            where = self._rescue(trainer)
            raise RunStopped(
                f"After step {trainer.n_training_steps}: {type(error).__name__}: {error} {where}"
            ) from error

    def __call__(self, trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> None:  # noqa: ARG002
        """After every complete step."""
        self._complete = trainer.n_training_samples
        finished = self._complete >= trainer.cfg.total_training_samples
        due = self.seconds > 0 and time.monotonic() - self._saved_at >= self.seconds
        due = self.group.count(int(due), "all") > 0
        asked = self._is_asked_to_stop()
        if not (finished or due or asked):
            return
        self._save(trainer)
        if asked or self._is_asked_to_stop():
            assert self.stop.number is not None
            raise RunStopped(
                f"Stopped after step {trainer.n_training_steps}, as asked. {self._last()}",
                exit_code=128 + self.stop.number,
            )

    def _is_asked_to_stop(self) -> bool:
        """Whether any process is. All hear the same: a signal that comes meanwhile counts the next time."""
        asked = self.group.count(int(self.stop.number is not None), "all") > 0
        if asked:
            self.stop.number = self.stop.number or signal.SIGTERM  # another process was asked
        return asked

    def _save(self, trainer: SAETrainer[Any, Any]) -> None:
        self.checkpoints.save(trainer)
        self._saved_at = time.monotonic()

    def _rescue(self, trainer: SAETrainer[Any, Any]) -> str:
        # An error inside a step leaves half of it done, or done by some of the runs in lockstep. That state
        # is of no use. What is common to many processes cannot be saved by the one that failed.
        parts = trainer.trainers.values() if isinstance(trainer, MultiSAETrainer) else [trainer]
        is_complete = all(part.n_training_samples == self._complete for part in parts)
        if self.group is ALONE and self._complete and is_complete:
            try:
                self._save(trainer)
            except CheckpointError as error:
                warnings.warn(str(error), stacklevel=2)
        return self._last()

    def _last(self) -> str:
        newest = self.checkpoints.newest()
        if newest is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {newest.path}, of step {newest.n_steps}."


@contextmanager
def after_training() -> Iterator[None]:
    """Around what is done with a run that has taken its last step, whose state a keeper has saved.

    Raises:
        RunStopped: something went wrong, such as a full disk; the run can be gone on with from there.
    """
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        raise RunStopped(
            f"All steps are done and kept in a checkpoint, but the model could not be saved and evaluated: "
            f"{type(error).__name__}: {error}"
        ) from error
