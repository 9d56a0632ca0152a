"""llamascopium's models compute what its code does: scaled in, gated by decoder norms, scaled back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file

import saelens_matryoshka as sm
from saelens_matryoshka.formats import converter
from tests.formats.coders import LATENTS, D, inputs

HOOK_IN, HOOK_OUT = "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out"
NORM_IN, NORM_OUT = 7.0, 3.0


def _norms(config: dict[str, Any]) -> dict[str, float]:
    return {config["hook_point_in"]: NORM_IN} | {config["hook_point_out"]: NORM_OUT}


def _write(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_E": torch.randn(D, LATENTS, generator=generator),
        "b_E": torch.randn(LATENTS, generator=generator),
        "W_D": torch.randn(LATENTS, D, generator=generator),
        "b_D": torch.randn(D, generator=generator),
    }
    if config["act_fn"] == "jumprelu":
        log_threshold = torch.randn(LATENTS, generator=generator)
        tensors["activation_function.log_jumprelu_threshold"] = log_threshold
    if config["norm_activation"] == "dataset-wise":
        for hook, norm in _norms(config).items():
            tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def _theirs(config: dict[str, Any], tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The forward pass, from the description of its fields."""
    scale_in = scale_out = 1.0
    if config["norm_activation"] == "dataset-wise":
        norms = _norms(config)
        scale_in = math.sqrt(D) / norms[config["hook_point_in"]]
        scale_out = math.sqrt(D) / norms[config["hook_point_out"]]
    pre = (x * scale_in) @ tensors["W_E"] + tensors["b_E"]
    norm = tensors["W_D"].norm(dim=1) if config["sparsity_include_decoder_norm"] else 1.0
    gated = pre * norm
    if config["act_fn"] == "jumprelu":
        gated = gated * (gated > tensors["activation_function.log_jumprelu_threshold"].exp())
    else:
        gated = gated.relu()
    if config["act_fn"] == "topk":
        top = gated.topk(config["top_k"], dim=-1)
        gated = torch.zeros_like(gated).scatter(-1, top.indices, top.values)
    return ((gated / norm) @ tensors["W_D"] + tensors["b_D"]) / scale_out


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
@pytest.mark.parametrize("target", [HOOK_IN, HOOK_OUT])
def test_it_computes_what_llamascopium_does(
    tmp_path: Path, act_fn: str, include_norm: bool, norm_activation: str, target: str
) -> None:
    config = {
        "sae_type": "sae",
        "hook_point_in": HOOK_IN,
        "hook_point_out": target,
        "d_model": D,
        "expansion_factor": LATENTS / D,
        "act_fn": act_fn,
        "top_k": 5,
        "norm_activation": norm_activation,
        "sparsity_include_decoder_norm": include_norm,
    }
    tensors = _write(tmp_path / "sae", config)
    sae = SAE.load_from_disk(tmp_path / "sae", converter=converter("llamascopium"))
    x = inputs()
    torch.testing.assert_close(sae(x), _theirs(config, tensors, x))
    assert sae.cfg.metadata.hook_name == HOOK_IN
    assert sae.cfg.metadata.hook_name_out == (None if target == HOOK_IN else target)
    if act_fn == "jumprelu":
        assert sm.truncate(sae, LATENTS).cfg.d_sae == LATENTS
