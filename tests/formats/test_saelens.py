from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

import saelens_matryoshka as sm
from saelens_matryoshka.formats.files import FormatError, read_safetensors, safetensors_shapes
from saelens_matryoshka.formats.saelens import open_folder
from tests.helpers import transcoder_config


def test_a_run_that_is_not_finished_is_named_as_one_with_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("k: 8\n")
    with pytest.raises(
        FormatError, match=r"a run that is not finished\? `train --resume` goes on with it\.$"
    ):
        open_folder(tmp_path)
    for tokens in ("8192", "11264"):
        checkpoint = tmp_path / "checkpoints" / tokens
        checkpoint.mkdir(parents=True)
        (checkpoint / "cfg.json").write_text("{}")
    with pytest.raises(FormatError, match=r"Its newest checkpoint is '.*11264'\."):
        open_folder(tmp_path)


@pytest.mark.parametrize("read", [safetensors_shapes, lambda path: read_safetensors(path, {})])
def test_weights_that_may_not_be_read_are_not_called_damaged(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors says that there is no such file. (The tests may run as root, who may read all.)"""
    path = tmp_path / "sae_weights.safetensors"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors may not be read by this user"):
        read(path)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "whitened"])
def test_a_checkpoint_in_training_reads_the_raw_activations(kind: str, tmp_path: Path) -> None:
    scaled = "covariance_whitening" if kind == "whitened" else "expected_average_only_in"
    sae = _in_training(kind, scaled)
    sae.save_model(tmp_path)
    x = torch.randn(50, sae.cfg.d_in)
    with pytest.raises(
        FormatError, match=rf"normalize_activations='{scaled}', .*there is no activation_scaler"
    ):
        open_folder(tmp_path)

    scaler = ActivationScaler(scaling_factor=2.5)
    if kind == "whitened":
        matrix = torch.eye(sae.cfg.d_in) + 0.1 * torch.randn(sae.cfg.d_in, sae.cfg.d_in)
        whitening = ActivationWhitening(torch.randn(sae.cfg.d_in), matrix, torch.linalg.inv(matrix))
        scaler = ActivationScaler(whitening=whitening)
    scaler.save(str(tmp_path / ACTIVATION_SCALER_CFG_FILENAME))
    opened = open_folder(tmp_path)
    torch.testing.assert_close(opened(x), scaler.unscale(sae(scaler.scale(x))), rtol=1e-4, atol=1e-4)
    assert opened.cfg.normalize_activations == "none"

    (tmp_path / ACTIVATION_SCALER_CFG_FILENAME).write_text("{}")
    with pytest.raises(FormatError, match=rf"normalize_activations='{scaled}', .*activation_scaler\.json"):
        open_folder(tmp_path)


def _in_training(kind: str, normalize_activations: str) -> Any:
    if kind == "transcoder":
        fields = {"input_gain": "none", "normalize_activations": normalize_activations}
        return sm.MatryoshkaTrainingTranscoder(transcoder_config(**fields))
    cfg = sm.MatryoshkaTrainingSAEConfig(
        d_in=8, d_sae=32, k=4, matryoshka_widths=[8, 32], normalize_activations=normalize_activations
    )
    return sm.MatryoshkaTrainingSAE(cfg)
