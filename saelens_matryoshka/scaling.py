"""SAELens's activation scaling: estimated from batches without NaN and Inf, and folded into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from typing_extensions import override

from saelens_matryoshka.architectures import MatryoshkaTraining

SCALED = ("expected_average_only_in", "covariance_whitening")
"""of SAELens's `normalize_activations`, those which are folded into the weights at the end of a training"""


def fold_scaling(sae: SAE[Any], scaler: ActivationScaler) -> None:
    """Fold what a trainer scales activations by into the weights, as SAELens's does at the end."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening.to(sae.device)
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)


class FiniteScaler(ActivationScaler):
    """Leaves bad batches out of its estimates as a training step does, or stops as it does.

    SAELens's own would be NaN after one of them, and every batch scaled by it.
    """

    def __init__(self, stock: ActivationScaler, sae: MatryoshkaTraining) -> None:
        super().__init__(stock.scaling_factor, stock.whitening)
        self.sae = sae

    @override
    def estimate_scaling_factor(
        self, d_in: int, data_provider: DataProvider, *args: Any, **kwargs: Any
    ) -> None:
        super().estimate_scaling_factor(d_in, self._batches(data_provider), *args, **kwargs)

    @override
    def estimate_whitening(self, d_in: int, data_provider: DataProvider, *args: Any, **kwargs: Any) -> None:
        super().estimate_whitening(d_in, self._batches(data_provider), *args, **kwargs)

    def _batches(self, provider: DataProvider) -> Iterator[torch.Tensor]:
        """What the estimates are made from."""
        return filter(self.sae.is_usable, provider)
