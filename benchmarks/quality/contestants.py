"""The dictionaries that are compared: what each is, and the settings it is trained with.

`OURS` is the one place for the settings of this package's architectures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig, TrainingSAEConfig

import saelens_matryoshka as sm
from benchmarks.quality.activations import Hooks

Task = Literal["sae", "transcoder", "skip_transcoder"]
TASKS: tuple[Task, ...] = ("sae", "transcoder", "skip_transcoder")

OURS: dict[str, Any] = {"threshold_calibration": "l0", "rescale_acts_by_decoder_norm": False}
"""Fields of our configs beyond the sizes, also of the fair rivals and the per-token TopK."""

LR = 6e-3
"""Peak learning rate of every contestant that SAELens trains, for the embedded model's short run"""

_CONFIGS: dict[Task, Any] = {
    "sae": sm.MatryoshkaTrainingSAEConfig,
    "transcoder": sm.MatryoshkaTrainingTranscoderConfig,
    "skip_transcoder": sm.MatryoshkaTrainingSkipTranscoderConfig,
}


@dataclass(frozen=True)
class Sizes:
    """What all contestants have in common."""

    d: int
    k: float
    widths: tuple[int, ...]
    """cumulative"""

    @property
    def d_sae(self) -> int:
        """Width of the whole dictionary."""
        return self.widths[-1]


@dataclass(frozen=True)
class Contestant:
    """One dictionary to train with SAELens's trainer."""

    name: str
    task: Task
    config: TrainingSAEConfig
    lr: float
    rival_of: str | None = None
    """name of the nested contestant one of whose prefixes this one is the fair rival of"""

    def at(self, lr: float) -> Contestant:
        """The same at another learning rate."""
        return replace(self, lr=lr)


def nested(task: Task, sizes: Sizes, hooks: Hooks) -> Contestant:
    """Ours."""
    name = f"matryoshka_{task}"
    return Contestant(name, task, _ours(task, hooks, sizes.d, sizes.k, sizes.widths), LR)


def rival(task: Task, sizes: Sizes, hooks: Hooks, width: int, l0: float) -> Contestant:
    """A plain BatchTopK of a prefix's width at the prefix's L0, otherwise with our settings."""
    config = _ours(task, hooks, sizes.d, l0, (width,))
    return Contestant("BatchTopK of this width", task, config, LR, rival_of=f"matryoshka_{task}")


def stock(sizes: Sizes, hooks: Hooks) -> Contestant:
    """SAELens's Matryoshka SAE at its defaults."""
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=sizes.d, d_sae=sizes.d_sae, k=sizes.k, matryoshka_widths=list(sizes.widths)
    )
    return Contestant("stock matryoshka_batchtopk", "sae", _located(config, "sae", hooks), LR)


def per_token(task: Task, sizes: Sizes, hooks: Hooks) -> Contestant:
    """A plain dictionary that keeps the k largest latents of each token."""
    config = _ours(task, hooks, sizes.d, sizes.k, (sizes.d_sae,), selection="token")
    return Contestant("per-token TopK", task, config, LR)


def _ours(
    task: Task, hooks: Hooks, d: int, k: float, widths: tuple[int, ...], **overrides: Any
) -> TrainingSAEConfig:
    fields: dict[str, Any] = {"d_in": d, "d_sae": widths[-1], "k": k, "matryoshka_widths": list(widths)}
    if task != "sae":
        fields["hook_name_out"] = hooks.target.hook_name
        fields["input_gain"] = "none" if hooks.source.gain is None else "norm_weight"
    return _located(_CONFIGS[task](**{**fields, **OURS, **overrides}), task, hooks)


def _located(config: TrainingSAEConfig, task: Task, hooks: Hooks) -> TrainingSAEConfig:
    """Record where the dictionary belongs, which the stock runner does otherwise."""
    locate(config.metadata, task, hooks)
    return config


def locate(metadata: Any, task: Task, hooks: Hooks) -> None:
    """Write a task's hooks into the metadata of an SAE or transcoder."""
    if task == "sae":
        metadata.hook_name = hooks.residual.hook_name
    else:
        metadata.hook_name = hooks.source.hook_name
        metadata.hook_name_out = hooks.target.hook_name
        metadata.input_frame = hooks.input_frame
