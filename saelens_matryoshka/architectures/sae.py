"""The Matryoshka SAE: architecture "matryoshka_sae", saved as a stock JumpReLU SAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from saelens_matryoshka.architectures.config import MatryoshkaTrainingConfig
from saelens_matryoshka.architectures.training import MatryoshkaTraining


@dataclass
class MatryoshkaTrainingSAEConfig(MatryoshkaTrainingConfig):
    """Configuration of a Matryoshka SAE.

    With its defaults it is the same function as SAELens's `matryoshka_batchtopk`: the same seed and data
    give the same losses. All fields are those of `MatryoshkaTrainingConfig`.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_sae"


class MatryoshkaTrainingSAE(MatryoshkaTraining):
    """A sparse autoencoder whose every prefix reconstructs its input on its own."""

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]

    @override
    def split_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        activations = batch.to(self.dtype)
        return activations, activations
