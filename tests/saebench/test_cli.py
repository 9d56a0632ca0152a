from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import run_command
from tests.saebench.dictionaries import labelled_words, random_dictionary

pytestmark = pytest.mark.usefixtures("sae_bench")


@pytest.mark.slow
def test_command_evaluates_the_embedded_model_offline(tmp_path: Path) -> None:
    random_dictionary().save_model(tmp_path / "transcoder")
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.py").write_text("import os\n\n\ndef path():\n    return os.getcwd()\n" * 200)
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    for split, rows in labelled_words().items():
        rows.to_json(labelled / f"{split}.jsonl")
    core = ["--set", "core.n_eval_reconstruction_batches=1", "--set", "core.context_size=32"]
    arguments = [
        *("saebench", "transcoder", "--evals", "core,tpp", "--prefixes", "16,64", "--text", "text"),
        *("--labelled", "labelled", *core, "--set", "tpp.n_values=[2, 10, 100]"),
    ]
    done = run_command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed, _, saved = done.stdout.partition("Saved in ")  # a path stays whole
    assert max(map(len, printed.splitlines())) <= 80
    assert saved.count("\n") == 1
    assert "core  L0" in done.stdout
    assert "TPP, 10 latents" in done.stdout
    assert "space: output" in done.stdout
    folder = tmp_path / "transcoder" / "saebench"
    assert {path.name for path in folder.iterdir()} == {"width-16", "width-64", "results.json"}
    saved = json.loads((folder / "width-64" / "tpp.json").read_text())
    assert saved["settings"]["n_values"] == [2, 10]
    assert saved["space"] == "output"
    again = run_command(*arguments, cwd=tmp_path)
    assert again.stdout == done.stdout
    numbers = json.loads(run_command(*arguments, "--json", cwd=tmp_path).stdout)
    assert {(row["eval"], row["width"]) for row in numbers["evals"]} == {
        (name, width) for name in ("core", "tpp") for width in (16, 64)
    }
    other = run_command(*arguments, "--seed", "1", cwd=tmp_path)
    assert other.returncode == 1
    assert "overwrite" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "'nowhere' is no folder"),
        (["sae", "--evals", "cor"], "evals='cor'"),
        (["sae", "--prefixes", "16,all"], "--prefixes='16,all'"),
        (["sae", "--set", "core"], "--set 'core': expected EVAL.NAME=VALUE"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], says: str, tmp_path: Path) -> None:
    random_dictionary().save_model(tmp_path / "sae")
    done = run_command("saebench", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sae" / "saebench").exists()
