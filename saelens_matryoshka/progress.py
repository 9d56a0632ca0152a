"""The progress bar of training, and what it says of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

_COLUMNS_WITH_LOSS = 100
_REFRESH_SECONDS = 0.5


class ProgressBar:
    """Moves a trainer's progress bar after every step, and says how it goes twice a second."""

    def __init__(self, trainer: SAETrainer[Any, Any] | MultiSAETrainer) -> None:
        self._trainer, self._shown_at = trainer, 0.0

    @torch.no_grad()
    def update(self, pbar: tqdm, shown: Callable[[], str]) -> None:  # type: ignore[type-arg]
        """Show the step that is done, and now and then the text that `shown` gives."""
        trainer, now = self._trainer, time.monotonic()
        total = trainer.cfg.total_training_samples
        finished = trainer.n_training_samples >= total
        pbar.unit, pbar.unit_scale = "tok", True
        # The last batch may go beyond the total, behind which tqdm would show no share and no bar.
        pbar.update(min(trainer.n_training_samples, total) - pbar.n)
        if now - self._shown_at < _REFRESH_SECONDS and not finished:
            return
        self._shown_at = now  # reading the numbers waits for the GPU, so it is not done every step
        pbar.set_description_str("", refresh=False)
        pbar.set_postfix_str(shown(), refresh=False)


@torch.no_grad()
def mean_l0(step_output: TrainStepOutput) -> float:
    """Latents kept per row of a step's batch: of the whole batch, where processes share it."""
    if isinstance(l0 := step_output.metrics.get("l0"), torch.Tensor):
        return l0.item()
    acts = step_output.feature_acts
    return (acts._nnz() if acts.is_sparse else int((acts > 0).sum())) / len(acts)


def summary(trainer: SAETrainer[Any, Any], step_output: TrainStepOutput, pbar: tqdm) -> str:  # type: ignore[type-arg]
    """A step in a line: FVU, L0, dead latents and, where there is room, the loss.

    tqdm would cut it amid its digits.
    """
    shown = (
        f"FVU {step_output.metrics['fvu']().item():.3f} L0 {mean_l0(step_output):.1f} "  # type: ignore[operator]
        f"dead {trainer.dead_neurons.float().mean().item():.0%}"
    )
    columns = getattr(pbar, "ncols", None)  # a bar that is switched off has none
    has_room = columns is None or columns >= _COLUMNS_WITH_LOSS
    return f"{shown} loss {step_output.loss.item():.3g}" if has_room else shown
