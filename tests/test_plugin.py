"""Importing the package registers its architectures and redirects the three seams, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens import ActivationsStore, MultiSAETrainingRunnerConfig, SAETrainer
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import saelens_matryoshka as sm
from saelens_matryoshka import plugin
from tests.helpers import sparse_batches, trainer_for, transcoder_config


def test_the_architectures_are_registered() -> None:
    for name, sae_class, cfg_class in (
        ("matryoshka_sae", sm.MatryoshkaTrainingSAE, sm.MatryoshkaTrainingSAEConfig),
        (
            "matryoshka_transcoder",
            sm.MatryoshkaTrainingTranscoder,
            sm.MatryoshkaTrainingTranscoderConfig,
        ),
        (
            "matryoshka_skip_transcoder",
            sm.MatryoshkaTrainingSkipTranscoder,
            sm.MatryoshkaTrainingSkipTranscoderConfig,
        ),
    ):
        assert SAE_TRAINING_CLASS_REGISTRY[name] == (sae_class, cfg_class)


def test_installing_twice_changes_nothing() -> None:
    def redirected() -> list[object]:
        return [
            ActivationsStore.from_config.__func__,
            SAETrainer.fit,
            MultiSAETrainingRunnerConfig.__post_init__,
        ]

    before = redirected()
    plugin.install()
    assert redirected() == before


def test_a_runner_of_one_hook_per_sae_takes_no_transcoder() -> None:
    """It would load the language model first, and fail at the first step."""
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=64, k=4, matryoshka_widths=[64])
    hook = "blocks.0.hook_resid_pre"
    assert MultiSAETrainingRunnerConfig({"plain": sae}, hook).saes == {"plain": sae}
    with pytest.raises(ValueError, match=r"saes\['mlp'\] is a transcoder.*layers\.train_layers"):
        MultiSAETrainingRunnerConfig({"plain": sae, "mlp": transcoder_config(d_in=16)}, hook)


def test_a_training_that_was_interrupted_goes_on_when_fit_is_called_again(tmp_path: Path) -> None:
    batches = sparse_batches(20, 64, 16)
    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=64, k=4, matryoshka_widths=[64])
    )
    trainer = trainer_for(sae, batches, n_checkpoints=4, checkpoint_path=str(tmp_path))

    def interrupted() -> Iterator[torch.Tensor]:
        yield from batches[:6]
        raise KeyboardInterrupt

    trainer.data_provider = interrupted()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert len(list(tmp_path.iterdir())) == 1
    trainer.data_provider = iter(batches[6:])
    trainer.fit()
    assert len(list(tmp_path.iterdir())) == 4
