"""The commands `import`, `export` and `hooks`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from typer.testing import CliRunner, Result

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.cli import app
from saelens_matryoshka.formats import SparseCoder, build


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _text(result: Result) -> str:
    assert result.exit_code == 0, result.exception
    return " ".join(result.stdout.split())


def _transcoder(layer: int, k: int | None = 8, skip: bool = False) -> SparseCoder:
    generator = torch.Generator().manual_seed(layer)
    W_enc = torch.randn(128, 64, generator=generator) / 128**0.5
    return SparseCoder(
        W_enc=W_enc,
        b_enc=torch.zeros(64),
        W_dec=torch.randn(64, 128, generator=generator),
        b_dec=torch.zeros(128),
        k=k,
        W_skip=torch.eye(128) if skip else None,
        metadata={
            "model_name": "tiny",
            "hook_name": f"blocks.{layer}.ln2.hook_normalized",
            "hook_name_out": f"blocks.{layer}.hook_mlp_out",
            "input_frame": "normalized",
            "context_size": 64,
        },
    )


@pytest.fixture
def topk(tmp_path: Path) -> Path:
    for layer in range(2):
        build(_transcoder(layer)).save_model(tmp_path / "topk" / f"layer_{layer}")
    return tmp_path / "topk"


def test_thresholds_are_fitted_on_the_way_out(topk: Path, tmp_path: Path) -> None:
    refused = _run("export", topk, "--to", "circuit-tracer", "--out", tmp_path / "out")
    assert "--calibrate-l0" in str(refused.exception)
    out = ["--to", "circuit-tracer", "--out", tmp_path / "out"]
    said = _text(_run("export", topk, *out, "--calibrate-l0", "--model", "tiny", "--tokens", 3000))
    assert said == f"circuit-tracer: {tmp_path / 'out'}"
    said = _text(_run("import", tmp_path / "out", "--from", "circuit-tracer", "--out", tmp_path / "back"))
    assert "blocks.1.ln2.hook_normalized → blocks.1.hook_mlp_out: 64 latents, jumprelu" in said
    sae = SAE.load_from_disk(tmp_path / "back" / "layer_1")
    result = sm.evaluate(
        sae, tiny.load_hooked_transformer(), tiny.text.dataset("held_out"), n_tokens=3000, n_ce_tokens=0
    )
    assert result.prefixes[0].l0 == pytest.approx(8, rel=0.02)


def test_what_loads_an_import_is_python_whatever_the_folder_is_called(topk: Path, tmp_path: Path) -> None:
    out = tmp_path / 'a "b"'
    said = _text(_run("import", topk / "layer_0", "--from", "saelens", "--out", out))
    assert f"SAE.load_from_disk({str(out)!r}) loads it." in said


def test_what_comes_in_is_evaluated_and_truncated(tmp_path: Path) -> None:
    """A TopK skip transcoder of sparsify, for which SAELens has no class, with widths of the user's."""
    folder = tmp_path / "sparsify" / "layers.1.mlp"
    folder.mkdir(parents=True)
    coder = _transcoder(1, skip=True)
    assert coder.W_skip is not None
    from safetensors.torch import save_file

    tensors = {"encoder.weight": coder.W_enc.T.contiguous(), "encoder.bias": coder.b_enc}
    save_file(
        {**tensors, "W_dec": coder.W_dec, "b_dec": coder.b_dec, "W_skip": coder.W_skip},
        folder / "sae.safetensors",
    )
    config = {"d_in": 128, "num_latents": 64, "k": 8, "transcode": True, "skip_connection": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    source = ["import", tmp_path / "sparsify", "--from", "sparsify", "--out", tmp_path / "out"]
    # the embedded model is a HookedTransformer, which has no hook behind the norm's gain
    hooks = [
        "--hook-name",
        "blocks.{layer}.ln2.hook_normalized",
        "--hook-name-out",
        "blocks.{layer}.hook_mlp_out",
    ]
    assert "no TopK transcoder with a skip" in str(_run(*source).exception)
    on_tiny = ["--calibrate-l0", "--model", "tiny", "--tokens", 2000]
    assert "--frame normalized" in str(_run(*source, *on_tiny).exception)
    calibrated = ["--calibrate-l0", "--l0", 6, "--model", "tiny", "--tokens", 2000]
    said = _text(_run(*source, *hooks, *calibrated, "--widths", "16,64"))
    assert "64 latents, jumprelu, widths 16, 64" in said
    sae = SAE.load_from_disk(tmp_path / "out")
    assert sae.cfg.architecture() == "jumprelu_skip_transcoder"
    assert sm.truncate(sae, 16).cfg.d_sae == 16
    result = sm.evaluate(
        sae, tiny.load_hooked_transformer(), tiny.text.dataset("held_out"), n_tokens=2000, n_ce_tokens=0
    )
    assert result.prefixes[-1].l0 == pytest.approx(6, rel=0.02)


def test_a_frame_is_changed_on_the_way(topk: Path, tmp_path: Path) -> None:
    out = ["--to", "saelens", "--out", tmp_path / "out"]
    _text(_run("export", topk, *out, "--frame", "mlp_in", "--model", "tiny"))
    sae = SAE.load_from_disk(tmp_path / "out" / "layer_0")
    assert sae.cfg.metadata.hook_name == "blocks.0.mlp.hook_in"
    bridge = tiny.load_bridge()
    _, cache = bridge.run_with_cache(bridge.to_tokens("def main():"))
    torch.testing.assert_close(
        sae(cache["blocks.0.mlp.hook_in"]),
        SAE.load_from_disk(topk / "layer_0")(cache["blocks.0.ln2.hook_normalized"]),
        atol=1e-3,
        rtol=1e-3,
    )


def test_topk_in_place_of_thresholds_is_asked_for(tmp_path: Path) -> None:
    coder = _transcoder(0, k=None).with_tensors(threshold=torch.ones(64))
    coder = coder.with_metadata(hook_name="blocks.0.mlp.hook_in", hook_name_out="blocks.0.mlp.hook_out")
    build(coder).save_model(tmp_path / "stock")
    out = ["--to", "sparsify", "--out", tmp_path / "out"]
    assert "--topk K" in str(_run("export", tmp_path / "stock", *out).exception)
    _text(_run("export", tmp_path / "stock", *out, "--topk", 5))
    assert json.loads((tmp_path / "out" / "layers.0.mlp" / "cfg.json").read_text())["k"] == 5
    assert "another function" in " ".join(_run("export", "--help").stdout.replace("│", " ").split())
    assert "in place of" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate-l0"], "--calibrate-l0 needs the language model"),
        (["--frame", "mlp_in"], "--frame needs the language model"),
        (["--l0", "3"], "give both"),
        (["--topk", "3", "--calibrate-l0"], "give one of them"),
        (["--frame", "sideways", "--model", "tiny"], "There is no frame 'sideways'"),
        (["--topk", "0"], "k=0"),
        (["--width", "7"], "JumpReLU thresholds first"),
    ],
)
def test_odd_options_are_refused(topk: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = _run("export", topk, "--to", "saelens", "--out", tmp_path / "out", *options)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_no_name_is_not_the_current_folder(
    topk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(topk)
    refused = _run("import", "", "--from", "saelens", "--out", tmp_path / "out")
    assert "'' is neither a file nor a folder" in str(refused.exception)


def test_hooks_names_a_language_model_that_there_is_not(tmp_path: Path) -> None:
    coder = _transcoder(0).with_metadata(model_name="tiny", dataset_path="the text of tiny")
    build(coder).save_model(tmp_path / "stock")
    refused = _run("hooks", "gpt-9", "--transcoder", tmp_path / "stock")
    assert "model 'gpt-9' is not one that TransformerLens knows" in str(refused.exception)


def test_odd_widths_are_refused(topk: Path, tmp_path: Path) -> None:
    source = ["import", topk, "--from", "saelens", "--out", tmp_path / "out", "--widths"]
    assert "must be whole numbers" in str(_run(*source, "8,x").exception)
    assert "fits d_sae=64 in neither reading" in str(_run(*source, "8,65").exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["import", "export", "hooks"])
def test_the_help_of_every_command_is_printed(command: str) -> None:
    assert "saelens-matryoshka " + command in _text(_run(command, "--help"))


def test_hooks_says_which_tensor_it_was_trained_on(topk: Path) -> None:
    """Random features predict nothing, and that is said."""
    result = _run("hooks", "tiny", "--layer", 1, "--transcoder", topk / "layer_1", "--tokens", 500)
    assert result.exit_code == 2
    said = " ".join(result.stdout.split())
    assert "blocks.1.hook_resid_mid" in said
    assert "declared" in said
    assert "L0 in training 8" in said
    assert "another layer, model or target" in said


def test_import_export_and_hooks_give_json_alone(topk: Path, tmp_path: Path) -> None:
    result = _run("export", topk, "--to", "saelens", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == {
        "format": "saelens",
        "folders": [str(tmp_path / "out")],
        "url": None,
    }
    result = _run("import", tmp_path / "out", "--from", "saelens", "--out", tmp_path / "in", "--json", "-")
    first, second = json.loads(result.stdout)
    assert Path(second["folder"]) == tmp_path / "in" / "layer_1"
    assert (first["hook_name"], first["d_sae"]) == ("blocks.0.ln2.hook_normalized", 64)
    assert SAE.load_from_disk(second["folder"]).cfg.d_sae == 64

    result = _run("hooks", "tiny", "--transcoder", topk / "layer_1", "--tokens", 500, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["agrees"] else 2)
    assert report["agrees"] == (report["declared"] in report["trained_on"])
    assert {"name", "fvu", "l0"} == set(report["candidates"][0])


def test_a_name_that_is_empty_is_not_the_current_folder(
    topk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(topk / "layer_0")
    for command in (
        ["export", "", "--to", "saelens", "--out", tmp_path / "out"],
        ["hooks", "tiny", "--transcoder", ""],
    ):
        assert "'' is no folder" in str(_run(*command).exception), command
    assert not (tmp_path / "out").exists()
