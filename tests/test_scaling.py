"""The scaling factor is estimated from batches without NaN and Inf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAETrainer

import saelens_matryoshka as sm
from saelens_matryoshka.runner import prepare_trainer
from tests.helpers import sparse_batches, trainer_for


def _trainer(batches: list[torch.Tensor], normalization: Any, may_skip: int) -> SAETrainer[Any, Any]:
    cfg = sm.MatryoshkaTrainingSAEConfig(
        d_in=16, d_sae=32, k=4, matryoshka_widths=[8, 32], normalize_activations=normalization
    )
    trainer = trainer_for(sm.MatryoshkaTrainingSAE(cfg), batches, n_batches_for_norm_estimate=3)
    trainer.sae.finite.may_skip = may_skip
    prepare_trainer(trainer)
    return trainer


def _estimate(trainer: SAETrainer[Any, Any], normalization: Any) -> torch.Tensor:
    scaler = trainer.activation_scaler
    if normalization == "covariance_whitening":
        scaler.estimate_whitening(16, trainer.data_provider, 3)
        assert scaler.whitening is not None
        return scaler.whitening.matrix
    scaler.estimate_scaling_factor(16, trainer.data_provider, 3)
    return torch.tensor(scaler.scaling_factor)


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_batch_is_left_out_of_the_estimate(normalization: Any, value: float) -> None:
    good = sparse_batches(5, 32, 16)
    bad = good[1].clone()
    bad[3, 5] = value
    expected = _estimate(_trainer(good, normalization, may_skip=0), normalization)
    trainer = _trainer([good[0], bad, *good[1:]], normalization, may_skip=1)
    with pytest.warns(UserWarning, match="in 1 of 32 rows.*Skipped, 1 of at most 1"):
        found = _estimate(trainer, normalization)
    assert torch.equal(found, expected)
    assert trainer.sae.finite.n_skipped == 1


def test_a_bad_batch_stops_the_estimate_where_none_may_be_skipped() -> None:
    good = sparse_batches(5, 32, 16)
    trainer = _trainer([good[0], good[1] * torch.nan], "expected_average_only_in", may_skip=0)
    with pytest.raises(sm.NonFiniteActivationsError, match="contain NaN or Inf in 32 of 32 rows"):
        _estimate(trainer, "expected_average_only_in")
    assert trainer.activation_scaler.scaling_factor is None
