from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.torch import load_file

from saelens_matryoshka.runs.folder import RunFolder, run_folder
from saelens_matryoshka.runs.recorded import read_lines
from saelens_matryoshka.runs.settings import Settings, parse_yaml, read_file, read_flags, resolve
from saelens_matryoshka.runs.training import train_run

SMALL = """
model_name: tiny
mapping: mlp
layer: 2
d_sae: 64
k: 4
training_tokens: 1280
train_batch_size_tokens: 128
context_size: 32
store_batch_size_prompts: 4
n_batches_in_buffer: 8
n_eval_batches: 2
exclude_special_tokens: true
"""


def _settings(flags: str = "") -> Settings:
    return resolve([parse_yaml(SMALL, "test"), read_flags(flags.split())])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = run_folder(tmp_path_factory.mktemp("results"), "tiny", "mlp-2", "erster Lauf ä")
    assert train_run(_settings(), folder, log_every=4, command=["train"]) is not None
    return folder


def test_a_run_folder_is_a_saelens_folder(run: RunFolder) -> None:
    sae = SAE.load_from_disk(run.path)
    assert type(sae).__name__ == "JumpReLUTranscoder"
    assert sae.cfg.d_sae == 64
    assert {path.name for path in run.path.iterdir()} >= {
        "cfg.json",
        "config.yaml",
        "metrics.json",
        "metrics.jsonl",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    }


def test_config_yaml_has_the_settings_and_the_record(run: RunFolder) -> None:
    config = yaml.safe_load(run.config.read_text())
    assert config == run.read()
    assert (config["d_sae"], config["hook_name"], config["lr"]) == (64, "blocks.2.ln2.hook_normalized", 0.007)
    assert config["started_at"] <= config["completed_at"]
    assert config["versions"].keys() >= {"torch", "sae-lens", "transformer-lens"}
    assert config["wandb"] is None
    assert "output_path" not in config
    assert "lr: 0.007  # recommended" in run.config.read_text()


def test_metrics_are_logged_at_the_first_the_last_and_every_nth_step(run: RunFolder) -> None:
    lines = read_lines(run.metrics_log)
    assert [line["step"] for line in lines] == [1, 4, 8, 10]
    assert [line["tokens"] for line in lines] == [128, 512, 1024, 1280]
    for line in lines:
        assert line["fvu_per_prefix"].keys() == {"4", "16", "32", "64"}
        assert line["fvu_per_prefix"]["64"] == line["fvu"]
        assert line["l0"] == 4.0
        assert 0 <= line["dead"] <= 1
        assert line["loss"] >= line["mse_loss"]
    assert lines[-1]["lr"] == 0  # decayed
    assert lines[0]["tokens_per_second"] is None
    assert lines[-1]["tokens_per_second"] > 0
    assert lines[-1]["seconds"] > lines[1]["seconds"]


def test_metrics_json_evaluates_every_prefix_of_what_was_saved(run: RunFolder) -> None:
    metrics = json.loads(run.metrics.read_text())
    assert [row["width"] for row in metrics["prefixes"]] == [4, 16, 32, 64]
    assert metrics["n_tokens"] <= 2 * 4 * 32
    assert metrics["prefixes"][-1]["ce_recovered"] is not None
    assert metrics["hook_name_out"] == "blocks.2.hook_mlp_out"


def test_config_yaml_repeats_the_run_to_the_last_bit(run: RunFolder, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # must not matter
    again = RunFolder(tmp_path / "again")
    train_run(resolve([read_file(run.config)]), again, log_every=4)
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        first, second = load_file(run.path / name), load_file(again.path / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert run.metrics.read_text() == again.metrics.read_text()
    timing = ("seconds", "tokens_per_second")
    logs = [
        [{key: value for key, value in line.items() if key not in timing} for line in read_lines(log)]
        for log in (run.metrics_log, again.metrics_log)
    ]
    assert logs[0] == logs[1]
    other = RunFolder(tmp_path / "other")
    train_run(resolve([read_file(run.config), read_flags(["--seed", "1"])]), other, log_every=4)
    assert read_lines(other.metrics_log)[0]["loss"] != logs[0][0]["loss"]


def test_a_used_folder_is_refused_and_left_alone(run: RunFolder) -> None:
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds a finished run. Choose another --name"):
        train_run(_settings(), run)
    assert before == {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--dataset_path nowhere/to-be-found", "nowhere/to-be-found"),
        ("--dtype float33", "float33"),
        ("--n_batches_in_buffer 3", "buffer of 96 rows .* train_batch_size_tokens=128: raise n_batches_in_b"),
        ("--activations_mixing_fraction 1.5", "activations_mixing_fraction=1.5 must be from 0 to 1"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(flags: str, says: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "results" / "run")
    with pytest.raises(Exception, match=says):
        train_run(_settings(flags), folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_and_biases_offline_keeps_its_files_and_its_id_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "with wandb")
    train_run(_settings("--log_to_wandb --wandb_log_frequency 2"), folder)
    id_ = folder.read()["wandb"]["id"]
    kept = [path.name for path in (folder.path / "wandb").glob("offline-run-*")]
    assert len(kept) == 1
    assert kept[0].endswith(id_)
    assert [path.name for path in tmp_path.iterdir()] == ["with wandb"]
    assert "wandb_id" not in folder.settings()  # so that a repetition is a run of its own

    plain = RunFolder(tmp_path / "without")
    train_run(_settings("--wandb_log_frequency 2"), plain)
    weights: list[Any] = [load_file(one.path / "sae_weights.safetensors") for one in (folder, plain)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_text_file_is_trained_on(tmp_path: Path) -> None:
    text = tmp_path / "my text.jsonl"
    line = json.dumps({"text": "def main():\n    return 'some text of mine'\n" * 30})
    text.write_text("\n".join([line] * 40))
    folder = RunFolder(tmp_path / "run")
    settings = resolve([parse_yaml(SMALL, "test"), read_flags(["--dataset_path", str(text)])])
    assert train_run(settings, folder) is not None
    assert folder.read()["dataset_path"] == str(text)


@pytest.mark.parametrize("tokenized", [False, True])
def test_a_saved_dataset_is_trained_on(tokenized: bool, tmp_path: Path) -> None:
    saved = tmp_path / "my tokens"
    rows: dict[str, Any] = {"text": ["def main():\n    return 'some text of mine'\n" * 30] * 40}
    if tokenized:
        rows = {"input_ids": torch.randint(1, 500, (40, 64)).tolist()}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(saved))
    flags = ["--dataset_path", str(saved), "--is_dataset_tokenized", str(tokenized)]
    folder = RunFolder(tmp_path / "run")
    assert train_run(resolve([parse_yaml(SMALL, "test"), read_flags(flags)]), folder) is not None
    assert folder.read()["dataset_path"] == str(saved)


def test_a_saved_dataset_without_the_split_to_train_on_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["some"]})}).save_to_disk(str(saved))
    with pytest.raises(ValueError, match=r"--dataset_path .*saved' has no split 'train', but test\."):
        train_run(_settings(f"--dataset_path {saved}"), RunFolder(tmp_path / "run"))


def test_a_text_of_one_long_document_is_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("for name in names: print(name, end=' ')  " * 3000)
    folder = RunFolder(tmp_path / "run")
    settings = resolve([parse_yaml(SMALL, "test"), read_flags(["--dataset_path", str(text)])])
    assert train_run(settings, folder) is None
    assert not folder.metrics.exists()
    assert folder.read()["completed_at"]
