"""Gemma Scope's files are read with their thresholds, and in the frame they were trained in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file

from saelens_matryoshka.formats import FormatError, SparseCoder, converter
from saelens_matryoshka.formats.export import import_models
from tests.formats.coders import expected_output, inputs, random_coder
from tests.formats.hub_cache import hub_cache, lay_out  # noqa: F401

FOLDER_1 = "layer_19/width_16k/average_l0_12"
FOLDER_2 = "transcoder_all/layer_3_width_16k_l0_small"


def _write_npz(folder: Path, coder: SparseCoder) -> None:
    folder.mkdir(parents=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(folder / "params.npz", **{name: getattr(coder, name).numpy() for name in names})


def _write_params(folder: Path, coder: SparseCoder, config: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True)
    tensors = {"w_enc": coder.W_enc, "w_dec": coder.W_dec, "b_enc": coder.b_enc, "b_dec": coder.b_dec}
    assert coder.threshold is not None
    tensors["threshold"] = coder.threshold
    if coder.W_skip is not None:
        tensors["affine_skip_connection"] = coder.W_skip.T.contiguous()
    save_file(tensors, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def test_a_gemma_scope_transcoder_reads_the_norm_before_its_gain(
    tmp_path: Path,
    hub_cache: Path,  # noqa: F811
) -> None:
    coder = random_coder()
    _write_npz(tmp_path / "repo" / FOLDER_1, coder)
    lay_out(hub_cache, "google/gemma-scope-2b-pt-transcoders", tmp_path / "repo")
    sae = SAE.from_pretrained(
        "google/gemma-scope-2b-pt-transcoders", FOLDER_1, converter=converter("gemma-scope")
    )
    x = inputs()
    torch.testing.assert_close(sae(x), expected_output(coder, x))
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.19.ln2.hook_normalized"
    assert metadata.hook_name_out == "blocks.19.hook_mlp_out"
    assert (metadata.input_frame, metadata.model_name) == ("normalized", "gemma-2-2b")
    assert (metadata.l0, metadata.context_size) == (12, 1024)
    assert sae.cfg.architecture() == "jumprelu_transcoder"
    assert (sae.encode(x) > 0).sum() < (x @ coder.W_enc + coder.b_enc > 0).sum(), "thresholds were lost"


@pytest.mark.parametrize(
    ("repository", "hook", "reshape"),
    [
        ("gemma-scope-9b-it-res", "blocks.19.hook_resid_post", "none"),
        ("gemma-scope-2b-pt-mlp", "blocks.19.hook_mlp_out", "none"),
        ("gemma-scope-2b-pt-att", "blocks.19.attn.hook_z", "hook_z"),
    ],
)
def test_gemma_scope_saes_by_the_name_of_their_repository(
    tmp_path: Path, repository: str, hook: str, reshape: str
) -> None:
    coder = random_coder(transcoder=False, subtract_b_dec=False)
    _write_npz(tmp_path / repository / FOLDER_1, coder)
    sae = SAE.load_from_disk(tmp_path / repository / FOLDER_1, converter=converter("gemma-scope"))
    assert sae.cfg.metadata.hook_name == hook
    assert sae.cfg.metadata.hook_name_out is None
    assert sae.cfg.reshape_activations == reshape
    x = inputs()
    got = sae(x.view(-1, 2, 8)).flatten(1) if reshape == "hook_z" else sae(x)
    torch.testing.assert_close(got, expected_output(coder, x))


def test_a_folder_that_does_not_tell_what_it_is_of_needs_to_be_told(tmp_path: Path) -> None:
    _write_npz(tmp_path / "downloads", random_coder())
    with pytest.raises(FormatError, match="nothing tells which hook"):
        SAE.load_from_disk(tmp_path / "downloads", converter=converter("gemma-scope"))
    hooks = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    sae = SAE.load_from_disk(tmp_path / "downloads", converter=converter("gemma-scope", **hooks))
    assert sae.cfg.metadata.hook_name_out == "blocks.2.hook_mlp_out"
    # hooks given in place of the file's own: what the file says of its frame is not said of them
    _write_npz(tmp_path / "gemma-scope-2b-pt-transcoders" / FOLDER_1, random_coder())
    path = tmp_path / "gemma-scope-2b-pt-transcoders" / FOLDER_1
    given = converter("gemma-scope", hook_name="blocks.{layer}.mlp.hook_in")
    metadata = SAE.load_from_disk(path, converter=given).cfg.metadata
    assert (metadata.hook_name, metadata.input_frame) == ("blocks.19.mlp.hook_in", None)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_a_gemma_scope_2_transcoder_reads_the_mlps_true_input(
    tmp_path: Path,
    hub_cache: Path,  # noqa: F811
    skip: bool,
    with_config: bool,
) -> None:
    coder = random_coder(skip=skip)
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "affine_connection": skip,
    }
    folder = FOLDER_2 + ("_affine" if skip else "")
    _write_params(tmp_path / "repo" / folder, coder, config if with_config else None)
    lay_out(hub_cache, "google/gemma-scope-2-1b-pt", tmp_path / "repo")
    sae = SAE.from_pretrained("google/gemma-scope-2-1b-pt", folder, converter=converter("gemma-scope-2"))
    x = inputs()
    torch.testing.assert_close(sae(x), expected_output(coder, x))
    assert sae.cfg.metadata.hook_name == "blocks.3.mlp.hook_in"
    assert sae.cfg.metadata.hook_name_out == "blocks.3.hook_mlp_out"
    assert sae.cfg.metadata.model_name == "google/gemma-3-1b-pt"
    assert sae.cfg.architecture() == ("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder")


def test_a_config_and_its_file_must_agree_on_the_skip(tmp_path: Path) -> None:
    config = {"architecture": "jump_relu", "affine_connection": True}
    _write_params(tmp_path / FOLDER_2, random_coder(), config)
    with pytest.raises(FormatError, match="affine_connection=True"):
        SAE.load_from_disk(tmp_path / FOLDER_2, converter=converter("gemma-scope-2"))


def test_a_circuit_tracer_set_may_list_files_of_gemma_scope(
    tmp_path: Path,
    hub_cache: Path,  # noqa: F811
) -> None:
    coders = [random_coder(layer=layer) for layer in range(2)]
    _write_npz(tmp_path / "scope" / "layer_0" / "x", coders[0])
    _write_params(tmp_path / "scope" / "layer_1" / "x", coders[1], None)
    lay_out(hub_cache, "google/scope", tmp_path / "scope")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\n"
        "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
        "transcoders:\n- hf://google/scope/layer_0/x/params.npz\n"
        "- hf://google/scope/layer_1/x/params.safetensors?revision=main\n"
    )
    lay_out(hub_cache, "mwhanna/gemma-scope-transcoders", tmp_path / "set")
    import_models("mwhanna/gemma-scope-transcoders", "circuit-tracer", tmp_path / "out")
    x = inputs()
    for layer, coder in enumerate(coders):
        sae = SAE.load_from_disk(tmp_path / "out" / f"layer_{layer}")
        torch.testing.assert_close(sae(x), expected_output(coder, x))
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.ln2.hook_normalized"
