"""`train --layers`: a folder per layer, and one that circuit-tracer's set is exported from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saelens_matryoshka.cli import app

_SIZES = ["--model_name", "tiny", "--d_sae", "64", "-k", "4", "--training_tokens", "512"]
_SIZES += ["--train_batch_size_tokens", "128", "--context_size", "32", "--n_eval_batches", "1"]
_SIZES += ["--store_batch_size_prompts", "4", "--n_batches_in_buffer", "8"]


def _run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_layers_are_trained_left_alone_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--mapping", "mlp", "--name", "n", *_SIZES]
    said = _run(*words, "--layers", "0-1")
    assert "export results/tiny/mlp-0-1/n --to circuit-tracer" in said
    assert next(line for line in said.splitlines() if " width " in line).split()[-1] == "zero", "ablation"
    parent = Path("results/tiny/mlp-0-1/n")
    assert {path.name for path in parent.iterdir()} >= {"mlp-0", "mlp-1", "checkpoints"}
    assert "Finished before, and left alone: mlp-0, mlp-1." in _run(*words, "--layers", "0-1").replace(
        "\n", " "
    )
    _run("export", str(parent), "--to", "circuit-tracer", "--out", "graphs")
    assert {path.name for path in Path("graphs").iterdir()} >= {"layer_0.safetensors", "layer_1.safetensors"}
    with pytest.raises(ValueError, match="finished runs"):
        _run("train", "--resume", str(parent))


def test_no_export_is_offered_that_would_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = _run("train", "--mapping", "mlp", "--name", "n", *_SIZES, "--layers", "1-2")
    assert "Saved in results/tiny/mlp-1-2/n, a folder each." in said
    assert "circuit-tracer" not in said


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = _run("train", "--layers", "0,2", "--mapping", "mlp,attention", "--dry-run", "--json", *_SIZES)
    plan = json.loads(printed[printed.index('{"folder"') :].splitlines()[0])
    assert list(plan["runs"]) == ["mlp-0", "mlp-2", "attention-0", "attention-2"]
    (estimated,) = plan["estimate"]["devices"]
    assert estimated["parts"]["dictionary"] == 4 * 4 * (64 * (128 + 128 + 1) + 128)
    said = _run("train", "--layers", "0,2", "--mapping", "mlp", "--dry-run", *_SIZES)
    assert "Time: " in said
    rows = [line.split() for line in said.splitlines()]
    assert ["mlp-2", "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"] in rows
    (origin,) = (row[2:] for row in rows if row[:1] == ["training_tokens"])
    assert origin == ["flag"]
    assert not any(row[:1] == ["hook_name"] for row in rows), "not common to all"
    assert list(tmp_path.iterdir()) == []


def test_one_layer_and_several_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="--layer 1"):
        _run("train", "--layers", "0-1", "--layer", "1", *_SIZES)


def test_many_processes_train_one_layer_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    found = CliRunner().invoke(app, ["train", "--preset", "tiny", "--layers", "0-1"])
    assert "trained in lockstep by one process" in str(found.exception)
    assert not list(tmp_path.iterdir())
