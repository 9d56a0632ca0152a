"""The Matryoshka SAE: architecture "matryoshka_sae", saved as a stock JumpReLU SAE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from saelens_matryoshka.architectures.config import MatryoshkaTrainingConfig
from saelens_matryoshka.architectures.training import MatryoshkaTraining


@dataclass
class MatryoshkaTrainingSAEConfig(MatryoshkaTrainingConfig):
    """Configuration of a Matryoshka SAE.

    With its defaults it is the same function as SAELens's `matryoshka_batchtopk`: the same seed and data
    give the same losses. `recommended` gives better settings. All fields are those of
    `saelens_matryoshka.architectures.config.MatryoshkaTrainingConfig`, whose help explains them.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_sae"

    @override
    @classmethod
    def _recommended_fields(cls, k: float) -> dict[str, Any]:
        return {
            "decoder_init_norm": 0.3,
            "aux_k": max(1, math.ceil(k / 4)),
            "threshold_calibration": "l0",
        }


class MatryoshkaTrainingSAE(MatryoshkaTraining):
    """A sparse autoencoder whose every prefix reconstructs its input on its own.

    SAELens's runner makes one of its config, trains it, and saves the stock SAE that `inference_model` gives.
    """

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]
    config_class = MatryoshkaTrainingSAEConfig

    @override
    def split_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if batch.shape[-1] != self.cfg.d_in:
            raise ValueError(f"The batch has {batch.shape[-1]} columns, but d_in={self.cfg.d_in}.")
        activations = batch.to(self.dtype)
        return activations, activations
