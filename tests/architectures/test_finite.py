"""NaN and Inf stop a training, or are left out and counted; they never reach the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import saelens_matryoshka as sm
from saelens_matryoshka.progress import mean_l0
from saelens_matryoshka.runner import prepare_trainer
from tests.helpers import sparse_batches, trainer_for

D, BATCH = 8, 32


def _sae(**overrides: Any) -> sm.MatryoshkaTrainingSAE:
    settings: dict[str, Any] = {"d_in": D, "d_sae": 24, "k": 2, "matryoshka_widths": [8, 24]}
    return sm.MatryoshkaTrainingSAE(sm.MatryoshkaTrainingSAEConfig(**{**settings, **overrides}))


def _transcoder() -> sm.MatryoshkaTrainingTranscoder:
    return sm.MatryoshkaTrainingTranscoder(
        sm.MatryoshkaTrainingTranscoderConfig(
            d_in=D // 2, d_sae=24, k=2, matryoshka_widths=[8, 24], hook_name_out="out"
        )
    )


def _trainer(sae: Any, batches: list[torch.Tensor], may_skip: int = 0) -> Any:
    trainer = trainer_for(sae, batches)
    prepare_trainer(trainer)
    sae.finite.may_skip = may_skip
    return trainer


def _step(trainer: Any, batch: torch.Tensor) -> Any:
    output = trainer.step(batch)
    trainer.n_training_steps += 1
    return output


def _parameters(sae: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", [_sae, _transcoder])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_bad_batch_is_left_out_if_asked(make: Any, value: float, bad_step: int) -> None:
    """The weights end as without it, but for the schedule, which here is constant."""
    batches = sparse_batches(5, BATCH, D)
    bad = batches[0].clone()
    bad[3, 1] = value
    torch.manual_seed(0)
    clean = _trainer(make(), batches)
    for batch in batches:
        _step(clean, batch)
    torch.manual_seed(0)
    skipping = _trainer(make(), batches, may_skip=1)
    for batch in batches[:bad_step]:
        _step(skipping, batch)
    with pytest.warns(UserWarning, match=f"Step {bad_step}: .*Skipped, 1 of at most 1"):
        _step(skipping, bad)
    for batch in batches[bad_step:]:
        _step(skipping, batch)
    assert skipping.sae.finite.n_skipped == 1
    assert _same(_parameters(skipping.sae), _parameters(clean.sae))
    with pytest.raises(sm.NonFiniteActivationsError, match="Step 6.*1 batches had been skipped before"):
        _step(skipping, bad)


def test_step_that_was_left_out_can_be_logged() -> None:
    batches = sparse_batches(2, BATCH, D)
    trainer = _trainer(_sae(), batches, may_skip=1)
    with pytest.warns(UserWarning, match="Skipped"):
        output = _step(trainer, batches[0] * torch.nan)
    logged = trainer.build_train_step_log_dict(output, n_training_samples=BATCH)
    for name in ("l0", "fvu_w8"):
        assert math.isnan(logged[f"metrics/{name}"])
    assert math.isnan(mean_l0(output))


def _break_gradient(sae: Any, name: str, value: float) -> Any:
    """The next gradient of a parameter gets a bad value."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient[(0,) * gradient.dim()] = value
        return gradient

    handle = sae.get_parameter(name).register_hook(hook)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_bad_gradient_never_reaches_the_weights(name: str, value: float, tmp_path: Path) -> None:
    batches = sparse_batches(5, BATCH, D)
    trainer = _trainer(_sae(), batches)
    for batch in batches[:3]:
        _step(trainer, batch)
    before = _parameters(trainer.sae)
    moments = {p: s["exp_avg"].clone() for p, s in trainer.optimizer.state.items()}
    _break_gradient(trainer.sae, name, value)
    _step(trainer, batches[3])
    assert _same(_parameters(trainer.sae), before)
    assert all(torch.equal(s["exp_avg"], moments[p]) for p, s in trainer.optimizer.state.items())
    with pytest.raises(sm.NonFiniteActivationsError, match="Step 3: the gradient holds NaN or Inf"):
        trainer.sae.save_model(tmp_path)  # nothing is saved as if it were well
    _break_gradient(trainer.sae, name, value)
    _step(trainer, batches[3])
    with pytest.raises(sm.NonFiniteActivationsError, match="Step 4: the gradient holds NaN or Inf"):
        _step(trainer, batches[4])
    trainer.sae.finite.may_skip = 1
    _break_gradient(trainer.sae, name, value)
    _step(trainer, batches[3])
    with pytest.warns(UserWarning, match="Skipped, 1 of at most 1"):
        _step(trainer, batches[4])
    assert not _same(_parameters(trainer.sae), before)


def test_a_gradient_of_zero_is_right_where_the_loss_is_zero() -> None:
    trainer = _trainer(_sae(), sparse_batches(3, BATCH, D))
    _step(trainer, torch.zeros(BATCH, D))
    before = _parameters(trainer.sae)
    _step(trainer, torch.zeros(BATCH, D))
    assert _same(_parameters(trainer.sae), before)
    _step(trainer, torch.randn(BATCH, D))
    trainer.sae.finite.settle()
    assert not _same(_parameters(trainer.sae), before)


def test_bad_gradient_of_the_last_step_is_told() -> None:
    batches = sparse_batches(3, BATCH, D)
    trainer = trainer_for(_sae(), batches)

    def break_last(trainer: Any, _: Any) -> None:
        if trainer.n_training_steps == 2:
            _break_gradient(trainer.sae, "W_dec", torch.nan)

    from saelens_matryoshka.runner import observe

    observe(trainer, break_last)
    with pytest.raises(sm.NonFiniteActivationsError, match="Step 2: the gradient"):
        trainer.fit()


@pytest.mark.parametrize(
    ("size", "says"), [(1e8, None), (1e15, "Step 0: the gradient"), (1e25, "Step 0: the loss is not finite")]
)
def test_overflow_is_told_and_weights_stay_finite(size: float, says: str | None) -> None:
    """The largest float32 is 3.4·10³⁸: squares overflow before the activations do."""
    batches = [batch * size for batch in sparse_batches(6, BATCH, D)]
    trainer = _trainer(_sae(), batches)

    def train() -> None:
        for batch in batches:
            _step(trainer, batch)
        trainer.sae.finite.settle()

    if says is None:
        train()
    else:
        with pytest.raises(sm.NonFiniteActivationsError, match=says):
            train()
    assert all(torch.isfinite(p).all() for p in trainer.sae.parameters())


def test_activations_that_overflow_the_weights_dtype_are_told() -> None:
    batches = [batch.double() * 1e40 for batch in sparse_batches(2, BATCH, D)]
    with pytest.raises(sm.NonFiniteActivationsError, match="source activations.*contain NaN or Inf"):
        _step(_trainer(_sae(), batches), batches[0])


def test_number_of_skipped_batches_survives_a_checkpoint(tmp_path: Path) -> None:
    batches = sparse_batches(2, BATCH, D)
    trainer = _trainer(_sae(), batches, may_skip=3)
    with pytest.warns(UserWarning, match="Skipped"):
        _step(trainer, batches[0] * torch.nan)
    trainer.sae.save_model(tmp_path)
    again = _sae()
    again.load_weights_from_checkpoint(tmp_path)
    assert again.finite.n_skipped == 1


def test_saving_does_not_move_the_threshold_that_is_trained_with(tmp_path: Path) -> None:
    sae = _sae(threshold_calibration="l0")
    batches = sparse_batches(3, BATCH, D)
    trainer = _trainer(sae, batches)
    for batch in batches:
        _step(trainer, batch)
    before = sae.topk_threshold.clone()
    sae.save_model(tmp_path)
    assert torch.equal(sae.topk_threshold, before)
    again = _sae(threshold_calibration="l0")
    again.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(again.topk_threshold, before)
    sae.calibrate_threshold()
    again.calibrate_threshold()
    assert torch.equal(again.topk_threshold, sae.topk_threshold)
    assert not torch.equal(again.topk_threshold, before)
