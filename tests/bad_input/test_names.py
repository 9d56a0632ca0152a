"""Names of files and folders that are odd and allowed: all works there, and nothing is left beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from sae_lens import SAE

from saelens_matryoshka.cli import main
from saelens_matryoshka.formats import build, converter
from saelens_matryoshka.formats.export import _names
from tests.bad_input.conftest import coder

NAMES = [
    "with spaces",
    "mit ümläut",
    "模型 一",
    "[bold]brackets",
    "it's",
    "ab:c",
    "CON",
    "dot.",
    "-dash",
    "%41",
]


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


@pytest.mark.parametrize("name", NAMES)
def test_models_are_exported_imported_and_evaluated_under_odd_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / name
    build(coder()).save_model(place / name)
    here = f"./{name}"
    _run(monkeypatch, place, "export", here, "--to", "dictionary-learning", "--out", f"{here} out")
    _run(monkeypatch, place, "import", f"{here} out", "--from", "dictionary-learning", "--out", f"{here} in")
    said = capsys.readouterr().out
    assert name in said.replace("\n", "")
    json_path = f"{here}.json"
    few = ["--tokens", "64", "--ce-tokens", "0", "--model", "tiny"]
    _run(monkeypatch, place, "eval", f"{here} in", *few, "--json", json_path)
    assert json.loads((place / json_path).read_text())["n_tokens"] > 0
    assert sorted(path.name for path in place.iterdir()) == sorted(
        [name, f"{name} in", f"{name} out", f"{name}.json"]
    )


def test_a_link_that_the_user_names_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(coder()).save_model(tmp_path / "disk" / "sae")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link").symlink_to(tmp_path / "disk" / "sae")
    _run(monkeypatch, tmp_path / "home", "import", "link", "--from", "saelens", "--out", "in")
    _run(monkeypatch, tmp_path / "home", "export", "link", "--to", "saelens", "--out", "out")
    SAE.load_from_disk(tmp_path / "home" / "link", converter=converter("saelens"))
    assert sorted(path.name for path in (tmp_path / "disk" / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_a_link_to_a_new_folder_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(coder()).save_model(tmp_path / "sae")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    _run(monkeypatch, tmp_path, "export", "sae", "--to", "saelens", "--out", "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "cfg.json").is_file()


def test_a_link_to_nowhere_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(coder()).save_model(tmp_path / "sae")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "export", "sae", "--to", "saelens", "--out", "out"])
    with pytest.raises(SystemExit):
        main()
    assert "--out out exists and is no folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="a read-only folder does not stop root")
@pytest.mark.parametrize(
    "arguments",
    [
        "export sae --to saelens --out shut/out",
        "import sae --from saelens --out shut/out",
        "eval sae --tokens 64 --ce-tokens 0 --json shut/x.json",
        "demo --out shut/out",
        "train --preset tiny --out shut/out",
    ],
)
def test_a_read_only_folder_is_refused_before_any_work(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(coder()).save_model(tmp_path / "sae")
    (tmp_path / "shut").mkdir(mode=0o555)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "read-only" in " ".join(said.err.split())
    assert "FVU" not in said.out
    (tmp_path / "shut").chmod(0o755)


def test_folders_named_after_hooks_are_fit_for_every_system() -> None:
    hooks = ["../../x", "...", "a/b:c", "", "CON", "nul", "x."]
    made = _names([coder().with_metadata(hook_name=hook) for hook in hooks])
    assert len(set(made)) == len(made)
    for name in made:
        assert name not in ("", ".", "..")
        assert not set(name) & set('<>:"/\\|?*')
        assert not name.endswith((".", " "))
        assert name.lower() not in ("con", "nul")
