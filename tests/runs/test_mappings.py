from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka.runs.mappings import NoModelConfigError, find_mapping, skeleton
from saelens_matryoshka.sites import find_site


@pytest.mark.parametrize(
    ("name", "layer", "source", "target", "gain", "label"),
    [
        ("mlp", 2, "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out", "norm_weight", "mlp-2"),
        (None, 0, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", "norm_weight", "mlp-0"),
        ("attention", 1, "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "none", "attention-1"),
        ("layer", 3, "blocks.3.hook_resid_pre", "blocks.3.hook_resid_post", "none", "layer-3"),
        (
            "cross-layer:1-3",
            None,
            "blocks.1.hook_resid_post",
            "blocks.3.hook_resid_post",
            "none",
            "cross-layer-1-3",
        ),
    ],
)
def test_a_transcoders_mapping(
    name: str | None,
    layer: int | None,
    source: str,
    target: str,
    gain: str,
    label: str,
    tiny_model: HookedTransformer,
) -> None:
    found = find_mapping(tiny_model, name, layer, transcoder=True)
    assert (found.hook_name, found.hook_name_out, found.input_gain, found.label) == (
        source,
        target,
        gain,
        label,
    )
    assert found.settings()["d_in"] == found.settings()["d_out"] == 128


@pytest.mark.parametrize(
    ("name", "hook"),
    [(None, "resid_post"), ("mlp", "mlp_out"), ("attention", "attn_out"), ("layer", "resid_post")],
)
def test_an_sae_reconstructs_the_target(name: str | None, hook: str, tiny_model: HookedTransformer) -> None:
    found = find_mapping(tiny_model, name, 1, transcoder=False)
    assert found.hook_name == f"blocks.1.hook_{hook}"
    assert found.settings() == {"hook_name": found.hook_name, "d_in": 128}


def test_a_model_with_folded_norms_has_no_gain() -> None:
    from saelens_matryoshka import tiny

    folded = tiny.load_hooked_transformer(fold_ln=True)
    assert find_mapping(folded, "mlp", 0, transcoder=True).input_gain == "none"


def test_a_skeleton_has_the_structure_and_takes_no_memory() -> None:
    model = skeleton("google/gemma-2-2b")
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())
    assert (model.cfg.d_model, model.cfg.n_layers) == (2304, 26)
    assert find_site(model, 8, "mlp_in").gain is not None
    assert torch.get_default_device() == torch.device("cpu")


def test_a_model_that_is_not_known_is_said_in_a_line() -> None:
    with pytest.raises(ValueError) as error:
        skeleton("gemma-2-2")
    assert str(error.value).count("\n") == 0
    assert "did you mean gemma-2-2b?" in str(error.value) or "google/gemma-2-2b" in str(error.value)


def test_a_configuration_that_cannot_be_had_is_said_in_a_line() -> None:
    with pytest.raises(NoModelConfigError) as error:
        skeleton("facebook/opt-125m")
    assert str(error.value).count("\n") == 0
