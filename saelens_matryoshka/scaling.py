"""SAELens's activation scaling, estimated from batches without NaN and Inf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from typing_extensions import override

from saelens_matryoshka.architectures import MatryoshkaTraining


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
