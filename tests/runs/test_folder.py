from __future__ import annotations

from pathlib import Path

import pytest

from saelens_matryoshka.runs.folder import RunFolder, new_run_folder, require_name, run_folder
from saelens_matryoshka.runs.settings import parse_yaml, resolve

TINY = "model_name: tiny\nmapping: mlp\nlayer: 2\nd_sae: 256\nk: 8\n"


@pytest.mark.parametrize(
    "name", ["first", "naïve Größe", "模型 1", "a.b-c_d", "18432-k96", "con1", "nullify"]
)
def test_a_good_name_is_kept(name: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "google/gemma-2-2b", "mlp-8", name)
    assert folder.path == tmp_path / "google--gemma-2-2b" / "mlp-8" / name
    folder.path.mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "--name is empty"),
        ("  ", "--name is empty"),
        ("a/b", "'/' cannot be in the name"),
        ("..", "must not start with a dot"),
        (".hidden", "must not start with a dot"),
        ("-rf", "must not start with a dot, a dash"),
        (" a", "must not start with"),
        ("a ", "nor end with a dot or a space"),
        ("a.", "nor end with a dot or a space"),
        ("a:b", "':' cannot be in the name"),
        ("a\\b", "cannot be in the name"),
        ("a\nb", r"'\\n' cannot be in the name"),
        ("a*", "cannot be in the name"),
        ("CON", "is reserved on Windows"),
        ("nul.txt", "is reserved on Windows"),
        ("ä" * 61, "is 122 bytes long"),
    ],
)
def test_a_name_that_some_system_does_not_take_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        require_name(name)


def test_what_is_not_the_folder_of_a_run_is_told_with_what_is_meant(tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "mlp-2" / "first"
    checkpoint = run / "checkpoints" / "8192"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text("started_at: '2026'\n")

    def said(path: Path) -> str:
        with pytest.raises(ValueError, match="is not the folder of a run") as error:
            RunFolder(path).read()
        return str(error.value).split(": ", 1)[1]

    assert said(tmp_path / "missing") == "there is no such folder."
    assert said(run.parent) == "it has no config.yaml. Name one of those in it: first."
    assert said(checkpoint) == f"it has no config.yaml. It is part of the run {run.resolve()}."
    assert said(tmp_path) == "it has no config.yaml."
    (run / "config.yaml").write_text("a: [b")
    assert said(run) == "its config.yaml is damaged."


def test_model_and_mapping_are_made_fit(tmp_path: Path) -> None:
    (tmp_path / "local model").mkdir()
    path = run_folder(tmp_path, str(tmp_path / "local model"), "a:b+c", "n").path
    assert path == tmp_path / "local model" / "a_b+c" / "n"
    assert run_folder(tmp_path, "nul", "..", "n").path == tmp_path / "nul_" / "_" / "n"


def test_new_names_are_never_those_of_another_run(tmp_path: Path) -> None:
    settings = resolve([parse_yaml(TINY, "test")])
    taken = set()
    for _ in range(5):
        folder = new_run_folder(tmp_path, settings)
        assert folder.path.name.startswith("256-k8-20")
        folder.path.mkdir(parents=True)
        taken.add(folder.path)
    assert len(taken) == 5


def test_only_a_folder_without_content_is_unused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.require_unused()
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    folder.require_unused()
    (folder.path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        folder.require_unused()
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(folder.path / "notes.txt").require_unused()
    folder.config.write_text("started_at: 2026-01-01\n")
    with pytest.raises(ValueError, match="not finished. Go on with `train --resume .*`, or"):
        folder.require_unused()
    folder.config.write_text("no: [yaml")
    with pytest.raises(ValueError, match="holds a run that is not finished"):
        folder.require_unused()


def test_config_yaml_keeps_every_kind_of_value(tmp_path: Path) -> None:
    text = TINY + (
        "dataset_path: 'a: b # c'\nseqpos_slice: [1, null]\nmodel_kwargs: {a: 1, b: [2]}\n"
        "sequence_separator_token: null\nexclude_special_tokens: [1, 2]\nwandb_project: größe 模型\n"
        "lr: 4e-4\nmatryoshka_widths: [64, 256]\n"
    )
    settings = resolve([parse_yaml(text, "a file\nwith a line break")])
    folder = RunFolder(tmp_path)
    folder.write_config(settings, started_at="now", command=["train", "--name", "x # y"])
    again = resolve([folder.settings()])
    assert again.cfg == settings.cfg
    folder.add_record("completed_at", "later")
    read = folder.read()
    assert (read["completed_at"], read["command"]) == ("later", ["train", "--name", "x # y"])


def test_a_folder_that_is_no_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the folder of a run"):
        RunFolder(tmp_path).read()


def test_a_record_is_there_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(resolve([parse_yaml(TINY, "test")]), started_at="1", completed_at="2")
    folder.add_record("completed_at", "3")
    assert folder.config.read_text(encoding="utf-8").count("completed_at") == 1
    assert folder.read()["completed_at"] == "3"
    assert folder.read()["started_at"] == "1"
