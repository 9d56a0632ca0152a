from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.constants import DTYPE_MAP

import saelens_matryoshka as sm
from saelens_matryoshka.formats import FormatError, SparseCoder, build, from_saelens, to_saelens
from saelens_matryoshka.formats.coder import believe, fold_decoder_norm, move_b_dec, scale_input
from tests.formats.coders import WIDTHS, D, assert_same, expected_output, inputs, random_coder

KINDS: list[dict[str, Any]] = [
    {"activation": activation, "transcoder": transcoder, "skip": skip}
    for activation in ("relu", "jumprelu", "topk")
    for transcoder in (False, True)
    for skip in (False, True)
    if not (skip and (activation == "topk" or not transcoder))
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_coder_is_a_stock_object_and_back(kind: dict[str, Any], tmp_path: Path) -> None:
    coder = random_coder(**kind)
    sae = build(coder)
    assert type(sae).__module__.startswith("sae_lens.")
    x = inputs()
    torch.testing.assert_close(sae(x), expected_output(coder, x))
    sae.save_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert_same(from_saelens(again), coder)
    assert sm.matryoshka_widths(again) == WIDTHS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["activation"] != "topk"], ids=str)
def test_truncate_accepts_what_was_built(kind: dict[str, Any]) -> None:
    coder = random_coder(**kind)
    narrow = sm.truncate(build(coder), WIDTHS[1])
    x = inputs()
    kept = {"W_enc": coder.W_enc[:, :24], "b_enc": coder.b_enc[:24], "W_dec": coder.W_dec[:24]}
    if coder.threshold is not None:
        kept["threshold"] = coder.threshold[:24]
    torch.testing.assert_close(narrow(x), expected_output(coder.with_tensors(**kept), x))


def test_a_topk_transcoder_is_a_stock_topk_object_that_replaces_the_target() -> None:
    coder = random_coder("topk")
    sae = build(coder)
    assert sae.cfg.architecture() == "topk"
    assert sae.cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out"
    assert not sae.cfg.apply_b_dec_to_input


@pytest.mark.parametrize("transcoder", [False, True])
def test_a_per_token_normalised_model_is_scaled_back_by_its_source(transcoder: bool) -> None:
    coder = dataclasses.replace(random_coder(transcoder=transcoder), layer_norm=True)
    x = 3 * inputs() + 1
    torch.testing.assert_close(build(coder)(x), expected_output(coder, x))
    assert_same(from_saelens(build(coder)), coder)


def test_what_saelens_has_no_class_for_is_refused_with_the_way_out() -> None:
    with pytest.raises(FormatError, match="no TopK transcoder with a skip.*--calibrate-l0"):
        build(random_coder("topk", skip=True))
    with pytest.raises(FormatError, match="TopK transcoder from 16 to 8 dimensions"):
        build(random_coder("topk", d_out=8))
    layer_norm = dataclasses.replace(random_coder(skip=True), layer_norm=True)
    with pytest.raises(FormatError, match="normalised transcoder with a skip"):
        build(layer_norm)


def test_the_widths_of_saelens_own_architecture_are_known() -> None:
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=48, k=4, matryoshka_widths=WIDTHS)
    sae = MatryoshkaBatchTopKTrainingSAE(cfg)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    coder = from_saelens(sae)
    assert coder.widths == WIDTHS
    assert coder.trained_k == 4


def test_what_other_formats_cannot_hold_is_refused() -> None:
    from sae_lens import GatedSAE, GatedSAEConfig

    with pytest.raises(FormatError, match="'gated' has no counterpart"):
        from_saelens(GatedSAE(GatedSAEConfig(d_in=D, d_sae=8)))
    sae = build(random_coder())
    sae.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(FormatError, match="expected_average_only_in"):
        from_saelens(sae)


@pytest.mark.parametrize("subtract", [False, True])
def test_moving_b_dec_keeps_the_function(subtract: bool) -> None:
    coder = random_coder(transcoder=False, subtract_b_dec=not subtract)
    moved = move_b_dec(coder, subtract=subtract)
    assert moved.subtract_b_dec == subtract
    assert_same(moved, coder, exact=False)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_folding_decoder_norms_keeps_the_function(activation: str) -> None:
    coder = random_coder(activation)
    folded = fold_decoder_norm(coder)
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(coder.d_sae))
    assert_same(folded, coder, exact=False)


@pytest.mark.parametrize("with_offset", [False, True])
def test_scaling_the_input_is_folded_into_every_tensor(with_offset: bool) -> None:
    coder = random_coder(skip=True)
    gain = torch.rand(D) + 0.5
    offset = torch.randn(D) if with_offset else None
    x = inputs()
    scaled = gain * x if offset is None else gain * x + offset
    torch.testing.assert_close(
        expected_output(scale_input(coder, gain, offset), x), expected_output(coder, scaled)
    )


def test_a_note_in_a_file_is_believed_only_where_it_is_of_the_right_type() -> None:
    written = {
        "hook_name": "blocks.0.hook_resid_post",
        "matryoshka_widths": [8, 48],
        "to_dict": "gotcha",
        "__class__": "gotcha",
        "context_size": "many",
    }
    assert set(believe(written)) == {"hook_name", "matryoshka_widths"}
    assert believe(None) == {}


def test_a_built_object_says_how_its_text_is_read_even_if_the_file_did_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metadata = build(random_coder()).cfg.metadata
    assert metadata.prepend_bos is True
    assert metadata.context_size == 128
    assert build(random_coder(context_size=32)).cfg.metadata.context_size == 32


def test_a_data_type_goes_by_all_of_saelens_names_for_it() -> None:
    for name, dtype in DTYPE_MAP.items():
        _, state = to_saelens(random_coder(), dtype=name)
        assert {tensor.dtype for tensor in state.values()} == {dtype}


def test_thresholds_and_k_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        SparseCoder(torch.ones(2, 3), torch.ones(3), torch.ones(3, 2), torch.ones(2), torch.ones(3), k=1)
