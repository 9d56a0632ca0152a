from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from sae_lens import SAE

from saelens_matryoshka import cli
from saelens_matryoshka.cli.output import Console
from saelens_matryoshka.cli.train import settings_table
from saelens_matryoshka.runs.fields import Given
from saelens_matryoshka.runs.presets import preset_names

SMALL = [
    "--preset=tiny",
    "--d_sae=64",
    "-k",
    "4",
    "--training_tokens=1280",
    "--train_batch_size_tokens=128",
    "--context_size=32",
    "--store_batch_size_prompts=4",
    "--n_batches_in_buffer=8",
    "--n_eval_batches=2",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


def _call(*args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_train_from_a_preset_then_runs_then_the_name_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("train", *SMALL, "--name", "erster Lauf", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "results" / "tiny" / "mlp-2" / "erster Lauf"
    assert "results/tiny/mlp-2/erster Lauf" in said
    assert "text: held out of the training data" in said
    assert max(map(len, said.splitlines())) <= 80
    assert SAE.load_from_disk(folder).cfg.metadata.model_name == "tiny"
    assert yaml.safe_load((folder / "config.yaml").read_text())["completed_at"]

    assert _call("runs", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "erster Lauf" in said
    assert "done" in said
    assert max(map(len, said.splitlines())) <= 80
    assert _call("runs", "--json", monkeypatch=monkeypatch) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["status"], run["tokens"], run["evaluated"]) == ("done", 1280, True)

    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert _call("train", *SMALL, "--name", "erster Lauf", "--seed", "1", monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert "holds a finished run. Choose another --name" in " ".join(error.split())
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_in_saelens_own_output_path_gives_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--architecture", "matryoshka_sae", "--layer", "1", "--output_path", "out/my sae", "--json"]
    assert _call("train", *SMALL, *flags, monkeypatch=monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == "out/my sae"
    assert [row["width"] for row in result["metrics"]["prefixes"]] == [4, 16, 32, 64]
    assert SAE.load_from_disk(tmp_path / "out" / "my sae").cfg.metadata.hook_name == "blocks.1.hook_mlp_out"


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("train", *SMALL, "--layer", "1", "--name", "n", "--dry-run", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    for word in (
        "blocks.1.ln2.hook_normalized → blocks.1.hook_mlp_out",
        "prefixes of 4, 16, 32, 64 latents, k = 4",
        "1,280 tokens in 10 steps",
        "results/tiny/mlp-1/n",
        "mapping mlp-1",
        "preset tiny",
        "recommended",
        "norm_weight",
    ):
        assert word in said, word
    assert max(map(len, said.splitlines())) <= 80
    assert _call("train", *SMALL, "--name", "n", "--dry-run", "--json", monkeypatch=monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["folder"] == "results/tiny/mlp-2/n"
    assert plan["settings"]["lr"] == 0.007
    assert plan["settings"]["log_to_wandb"] is False
    assert list(tmp_path.iterdir()) == []


def test_settings_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(settings_table({"dataset_path": Given("[bold]a[/].txt", "[b]/config.yaml")}))
    said = capsys.readouterr().out
    assert "[bold]a[/].txt" in said
    assert "[b]/config.yaml" in said


def test_wandb_is_logged_to_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, logs in ((["--wandb"], True), (["--logger.log_to_wandb", "True"], True), ([], False)):
        assert _call("train", *SMALL, "--dry-run", "--json", *flags, monkeypatch=monkeypatch) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["log_to_wandb"] is logs


def test_a_file_may_start_from_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("preset: tiny\nname: mine\nlayer: 3\nseed: 7\n")
    flags = ["--config", "mine.yaml", "--seed", "8", "--dry-run", "--json"]
    assert _call("train", *flags, monkeypatch=monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["folder"] == "results/tiny/mlp-3/mine"
    settings = plan["settings"]
    assert (settings["hook_name"], settings["seed"], settings["d_sae"]) == (
        "blocks.3.ln2.hook_normalized",
        8,
        1024,
    )


def test_presets_lists_and_shows_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("presets", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in preset_names())
    assert max(map(len, said.splitlines())) <= 80
    assert _call("presets", "gemma-2-2b-layer-8-wide", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "gemma-2-2b" in said
    assert "36864" in said
    assert _call("presets", "--json", monkeypatch=monkeypatch) == 0
    assert [preset["name"] for preset in json.loads(capsys.readouterr().out)] == preset_names()


def test_help_has_our_flags_and_help_all_saelens_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("train", "--help", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    for word in (
        "--preset",
        "--mapping",
        "--dry-run",
        "--help-all",
        "saelens-matryoshka train --preset tiny",
    ):
        assert word in said
    assert _call("train", "--help-all", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    for word in (
        "--preset",
        "--hook_name_out",
        "--matryoshka_widths",
        "--training_tokens",
        "--wandb_project",
    ):
        assert word in said
    for words in (["--architecture", "matryoshka_sae"], ["--architecture=matryoshka_sae"]):
        assert _call("train", "--help-all", *words, monkeypatch=monkeypatch) == 0
        assert "--hook_name_out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--preset tinny", "--preset 'tinny' is not known; did you mean tiny?"),
        ("--preset tiny --preste x", "--preste is not a setting; did you mean preset?"),
        (
            "--preset tiny --traning_tokens 5",
            "--traning_tokens is not a setting; did you mean training_tokens?",
        ),
        ("--preset tiny --mapping mlpp", "--mapping 'mlpp' is not known; did you mean mlp?"),
        ("--preset tiny --layer 99", "--layer 99: the model has 4 layers, 0 to 3."),
        ("--preset tiny --layer two", "--layer"),
        ("--preset tiny --config none.yaml", "--config 'none.yaml' cannot be read"),
        ("--preset tiny --name a/b", "--name 'a/b'"),
        ("--preset tiny --out o --output_path p", "is the run's folder, and so are --out and --name"),
        ("--preset tiny --output_path none", "a run needs a folder"),
        ("--preset tiny --log-every 0 --training_tokens 2048", "--log-every"),
        ("--preset tiny --device cuda:99 --training_tokens 2048", "cuda"),
        ("stray --preset tiny", "'stray' belongs to no flag"),
        ("--model_name tiny", "which activations?"),
        ("--preset", "preset"),
    ],
)
def test_bad_input_is_a_line_or_two_and_writes_nothing(
    flags: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert _call("train", *flags.split(), monkeypatch=monkeypatch) in (1, 2)
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_runs_of_no_folder_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _call("runs", monkeypatch=monkeypatch) == 1
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    assert _call("runs", monkeypatch=monkeypatch) == 0
    assert "There are no runs in results" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "results")
