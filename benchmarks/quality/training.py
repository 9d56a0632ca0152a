"""Train a contestant with SAELens's trainer on the cached activations."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class

from benchmarks.quality.activations import Activations
from benchmarks.quality.contestants import Contestant


def train(
    contestant: Contestant, activations: Activations, *, batch_size: int, seed: int, device: str = "cpu"
) -> TrainingSAE[Any]:
    """One pass over all training rows, in their order.

    The learning rate rises over the first 5% of the steps and falls to 0 over the last quarter. A latent
    counts as dead, and is helped by the auxiliary loss, after a tenth of the run.
    """
    torch.manual_seed(seed)
    contestant.config.device = device
    sae_class, _ = get_sae_training_class(contestant.config.architecture())
    sae = sae_class(contestant.config)
    hooks = activations.hooks
    if getattr(contestant.config, "input_gain", "none") == "norm_weight":
        assert hooks.source.gain is not None
        sae.set_input_gain(hooks.source.gain, hooks.source.offset)
    n_steps = len(activations) // batch_size
    batches = activations.batches(contestant.task, batch_size)
    n_for_norm = min(n_steps, 100)
    if contestant.config.normalize_activations != "none":  # the trainer takes these off the front
        batches = itertools.chain(
            itertools.islice(activations.batches(contestant.task, batch_size), n_for_norm), batches
        )
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=n_steps * batch_size,
            device=device,
            autocast=False,
            lr=contestant.lr,
            lr_end=contestant.lr,
            lr_scheduler_name="constant",
            lr_warm_up_steps=n_steps // 20,
            lr_decay_steps=n_steps // 4,
            adam_beta1=0.9,
            adam_beta2=0.999,
            n_restart_cycles=1,
            train_batch_size_samples=batch_size,
            dead_feature_window=max(n_steps // 10, 1),
            feature_sampling_window=n_steps + 1,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=n_for_norm,
        ),
        sae,
        batches,
    )
    return trainer.fit()
