"""The scaling and whitening of dictionaries in lockstep, estimated from the batches that they share."""

from __future__ import annotations

from sae_lens.training.multi_sae_trainer import MultiSAETrainer


def estimate_scaling_factors(trainer: MultiSAETrainer) -> None:
    """The scaling or whitening of each that has one, as SAELens estimates it, from the same batches.

    SAELens's own estimate for several keeps all the batches in memory, of all hooks, and has none in the
    place of a bad one. For whitening, whose sums are SAELens's own, the batches are kept here too.
    """
    needed = {
        name: one
        for name, one in trainer.trainers.items()
        if one.sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening")
        and one.activation_scaler.scaling_factor is None
        and one.activation_scaler.whitening is None
    }
    if not needed:
        return
    n = trainer.cfg.n_batches_for_norm_estimate
    whitened = {
        name: []
        for name, one in needed.items()
        if one.sae.cfg.normalize_activations == "covariance_whitening"
    }
    sums, counts = dict.fromkeys(needed, 0.0), dict.fromkeys(needed, 0)
    left = dict.fromkeys(needed, n)
    while any(left.values()):
        batches = next(trainer.data_provider)
        for name, one in needed.items():
            # each time it is asked for, a cache gives the next one
            if not left[name] or not one.sae.is_usable(batch := batches[name]):
                continue
            left[name] -= 1
            if name in whitened:
                whitened[name].append(batch)
                continue
            norms = batch.norm(dim=-1)
            sums[name] += norms.float().sum().item()
            counts[name] += norms.numel()
    for name, one in needed.items():
        if name in whitened:
            one.activation_scaler.estimate_whitening(one.sae.cfg.d_in, iter(whitened.pop(name)), n)
        else:
            one.activation_scaler.scaling_factor = one.sae.cfg.d_in**0.5 / (sums[name] / counts[name])
