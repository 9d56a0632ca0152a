"""Train a contestant with SAELens's trainer on the cached activations."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class

import saelens_matryoshka as sm
from benchmarks.quality.activations import Activations
from benchmarks.quality.contestants import Contestant


def train(
    contestant: Contestant,
    activations: Activations,
    *,
    batch_size: int,
    seed: int,
    device: str = "cpu",
    sae_class: type[TrainingSAE[Any]] | None = None,
) -> TrainingSAE[Any]:
    """One pass over all training rows, in their order; `sae_class` in place of the architecture's own."""
    torch.manual_seed(seed)
    config = copy.deepcopy(contestant.config)  # training writes to it
    config.device = device
    if sae_class is None:
        sae_class, _ = get_sae_training_class(config.architecture())
    sae = sae_class(config)
    hooks = activations.hooks
    if getattr(config, "input_gain", "none") == "norm_weight":
        assert hooks.source.gain is not None
        sae.set_input_gain(hooks.source.gain, hooks.source.offset)
    n_steps = len(activations) // batch_size
    batches = activations.batches(contestant.task, batch_size)
    n_for_norm = min(n_steps, 100)
    if config.normalize_activations != "none":  # the trainer takes these off the front
        batches = itertools.chain(
            itertools.islice(activations.batches(contestant.task, batch_size), n_for_norm), batches
        )
    fields = sm.recommended_runner_fields(
        config, training_tokens=n_steps * batch_size, train_batch_size_tokens=batch_size
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=n_steps * batch_size,
            device=device,
            autocast=False,
            **{**fields, "lr": contestant.lr},
            lr_end=contestant.lr,
            lr_scheduler_name="constant",
            adam_beta2=0.999,
            n_restart_cycles=1,
            train_batch_size_samples=batch_size,
            feature_sampling_window=n_steps + 1,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=n_for_norm,
        ),
        sae,
        batches,
    )
    return trainer.fit()
