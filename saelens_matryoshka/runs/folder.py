"""The folder of a training run, and what lies where in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """`results/{model}/{mapping}/{name}/`. The saved SAE lies in it directly, as SAELens saves it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_log(self) -> Path:
        """One JSON object a line, written as the run trains."""
        return self.path / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        """The evaluation of every prefix after training."""
        return self.path / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint, named by the number of tokens trained on."""
        return self.path / "checkpoints"
