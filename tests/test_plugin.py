"""Importing the package registers its architectures and redirects the two seams, once."""

from __future__ import annotations

from sae_lens import ActivationsStore, SAETrainer
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import saelens_matryoshka as sm
from saelens_matryoshka import plugin


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
    before = (ActivationsStore.from_config.__func__, SAETrainer.fit)
    plugin.install()
    assert (ActivationsStore.from_config.__func__, SAETrainer.fit) == before
