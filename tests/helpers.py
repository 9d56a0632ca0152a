"""Small builders that several tests use."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig

import saelens_matryoshka as sm


def sparse_batches(n_batches: int, batch_size: int, d: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of sparse combinations of fixed directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(6 * d, d, generator=generator)
    return [
        (
            (torch.rand(batch_size, 6 * d, generator=generator) < 0.03).float()
            * torch.rand(batch_size, 6 * d, generator=generator)
        )
        @ directions
        for _ in range(n_batches)
    ]


def trainer_for(sae: Any, batches: list[torch.Tensor], **overrides: Any) -> SAETrainer[Any, Any]:
    """SAELens's trainer, without a runner."""
    settings: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": len(batches) * len(batches[0]),
        "device": "cpu",
        "autocast": False,
        "lr": 1e-3,
        "lr_end": 1e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": len(batches[0]),
        "dead_feature_window": 15,
        "feature_sampling_window": 1000,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_batches_for_norm_estimate": 2,
    }
    return SAETrainer(SAETrainerConfig(**{**settings, **overrides}), sae, iter(batches))


def run_steps(trainer: SAETrainer[Any, Any], batches: list[torch.Tensor]) -> list[Any]:
    """Train on the batches; the step outputs."""
    outputs = []
    for batch in batches:
        outputs.append(trainer.step(batch))
        trainer.n_training_steps += 1
    return outputs


def transcoder_config(**overrides: Any) -> sm.MatryoshkaTrainingTranscoderConfig:
    """A small transcoder of the embedded model's layer 2 MLP."""
    settings: dict[str, Any] = {
        "d_in": 128,
        "d_sae": 256,
        "k": 8,
        "matryoshka_widths": [32, 96, 256],
        "hook_name_out": "blocks.2.hook_mlp_out",
        "input_gain": "norm_weight",
    }
    return sm.MatryoshkaTrainingTranscoderConfig(**{**settings, **overrides})


def runner_config(sae: Any, **overrides: Any) -> LanguageModelSAERunnerConfig[Any]:
    """A short run of SAELens's stock runner on the embedded model."""
    settings: dict[str, Any] = {
        "model_name": "tiny",
        "hook_name": "blocks.2.ln2.hook_normalized",
        "dataset_path": "tokens",
        "context_size": 32,
        "training_tokens": 128 * 8,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "lr": 1e-3,
        "n_eval_batches": 2,
        "dead_feature_window": 4,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(sae=sae, **{**settings, **overrides})
