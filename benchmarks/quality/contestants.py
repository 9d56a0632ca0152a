"""The dictionaries that are compared: what each is, and the settings it is trained with.

Ours, the fair rivals of its prefixes and the per-token TopK have the settings this package recommends. All
that SAELens trains, its own Matryoshka SAE too, has the runner fields recommended with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig, TrainingSAEConfig

import saelens_matryoshka as sm
from benchmarks.quality.activations import Hooks

Task = Literal["sae", "transcoder", "skip_transcoder"]
TASKS: tuple[Task, ...] = ("sae", "transcoder", "skip_transcoder")

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
    return _contestant(name, task, _ours(task, hooks, sizes.d, sizes.k, sizes.widths))


def rival(task: Task, sizes: Sizes, hooks: Hooks, width: int, l0: float) -> Contestant:
    """A plain BatchTopK of a prefix's width at the prefix's L0, otherwise with our settings."""
    config = _ours(task, hooks, sizes.d, l0, (width,))
    return _contestant("BatchTopK of this width", task, config, rival_of=f"matryoshka_{task}")


def stock(sizes: Sizes, hooks: Hooks) -> Contestant:
    """SAELens's Matryoshka SAE at its defaults."""
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=sizes.d, d_sae=sizes.d_sae, k=sizes.k, matryoshka_widths=list(sizes.widths)
    )
    return _contestant("stock matryoshka_batchtopk", "sae", _located(config, "sae", hooks))


def per_token(task: Task, sizes: Sizes, hooks: Hooks) -> Contestant:
    """A plain dictionary that keeps the k largest latents of each token."""
    config = _ours(task, hooks, sizes.d, sizes.k, (sizes.d_sae,), selection="token")
    return _contestant("per-token TopK", task, config)


def _contestant(name: str, task: Task, config: TrainingSAEConfig, rival_of: str | None = None) -> Contestant:
    """With the learning rate recommended for its width, which does not depend on the length of the run."""
    fields = sm.recommended_runner_fields(config, training_tokens=1, train_batch_size_tokens=1)
    return Contestant(name, task, config, fields["lr"], rival_of)


def _ours(
    task: Task, hooks: Hooks, d: int, k: float, widths: tuple[int, ...], **overrides: Any
) -> TrainingSAEConfig:
    fields: dict[str, Any] = {"d_in": d, "d_sae": widths[-1], "k": k, "matryoshka_widths": list(widths)}
    if task != "sae":
        fields["hook_name_out"] = hooks.target.hook_name
        fields["input_gain"] = "none" if hooks.source.gain is None else "norm_weight"
    return _located(_CONFIGS[task].recommended(**fields, **overrides), task, hooks)


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
