"""The numbers of a run, one JSON object a line, as it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput

from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.progress import mean_l0
from saelens_matryoshka.runs.recorded import read_lines


class MetricsLog:
    """An observer (see `saelens_matryoshka.runner.observe`) that writes `metrics.jsonl`.

    A line has `step` and `tokens` (completed), `seconds` and `tokens_per_second` of training, and of that
    step's batch, in the space the step trains in: `loss`, `mse_loss`, `aux_loss`, `fvu`, `fvu_per_prefix`
    (by width), `l0`, `dead` (share of the latents), `threshold`; `lr` is the next step's, as SAELens logs it.
    What is no finite number, of a batch that was left out, is null.

    Reading them waits for the GPU, so it is done at the first step, every `every` steps, and at the last.
    A log that is there already is continued: lines of steps that are now done again are dropped.

    Raises:
        ValueError: the log that is there is damaged, see `read_lines`.
    """

    def __init__(self, path: Path, every: int = 20) -> None:
        if every < 1:
            raise ValueError(f"--log-every {every} must be 1 or larger.")
        self.path, self.every = path, every
        self._before = read_lines(path)  # here, so that a damaged log is refused before the run goes on
        self._clock: tuple[float, int] | None = None
        """when, and at how many tokens, the last line was written"""
        self._seconds = 0.0

    def __call__(self, trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> None:
        """Write a line, if this step has one."""
        step, tokens = trainer.n_training_steps, trainer.n_training_samples
        if self._clock is None:
            self._continue(step)
            self._clock = time.monotonic(), tokens
        last = tokens >= trainer.cfg.total_training_samples
        if step != 1 and step % self.every and not last:
            return
        values = _values(trainer, output)
        now, (then, tokens_then) = time.monotonic(), self._clock
        self._clock = now, tokens
        self._seconds += now - then
        rate = (tokens - tokens_then) / (now - then) if tokens > tokens_then else None
        line = {
            "step": step,
            "tokens": tokens,
            "seconds": round(self._seconds, 3),
            **values,
            "tokens_per_second": None if rate is None else round(rate, 1),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dumps(line) + "\n")

    def _continue(self, step: int) -> None:
        """Keep the lines before a step that has just been done."""
        kept = [line for line in self._before if line["step"] < step]
        self._seconds = kept[-1]["seconds"] if kept else 0.0
        if self.path.exists():
            write_atomically(self.path, "".join(dumps(line) + "\n" for line in kept))


@torch.no_grad()
def _values(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> dict[str, Any]:
    def read(value: Any) -> float:
        value = value() if callable(value) else value
        return value.item() if isinstance(value, torch.Tensor) else value

    metrics = output.metrics
    return {
        "loss": read(output.loss),
        "mse_loss": read(output.losses["mse_loss"]),
        "aux_loss": read(output.losses["auxiliary_reconstruction_loss"]),
        "fvu": read(metrics["fvu"]),
        "fvu_per_prefix": {
            str(width): read(metrics[f"fvu_w{width}"]) for width in trainer.sae.cfg.matryoshka_widths
        },
        "l0": mean_l0(output),
        "dead": trainer.dead_neurons.float().mean().item(),
        "threshold": read(metrics["topk_threshold"]),
        "lr": trainer.optimizer.param_groups[0]["lr"],
    }
