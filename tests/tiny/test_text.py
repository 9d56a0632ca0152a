"""The text: a split that is the same everywhere, and errors that say what is missing."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from saelens_matryoshka.tiny import text


def relative_paths(split: text.Split) -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path.relative_to(root).as_posix() for path in text.stdlib_files(split)]


@pytest.fixture
def fake_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 200 one-line modules in a folder of our own."""
    for number in range(200):
        (tmp_path / f"module_{number}.py").write_text(f"x = {number}\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_split_of_a_file_depends_on_its_path_alone() -> None:
    # Pinned: the shipped model was trained on one side only, so no file may ever change sides.
    held_out = set(relative_paths("held_out"))
    train = set(relative_paths("train"))
    assert {"ast.py", "functools.py", "doctest.py", "xml/dom/minidom.py"} <= held_out
    assert {"typing.py", "inspect.py", "tarfile.py", "json/decoder.py"} <= train


def test_splits_are_disjoint_and_about_nine_to_one() -> None:
    held_out, train = relative_paths("held_out"), relative_paths("train")
    assert not set(held_out) & set(train)
    assert 0.07 < len(held_out) / (len(held_out) + len(train)) < 0.14


def test_listing_is_deterministic_and_mixes_subjects() -> None:
    paths = relative_paths("train")
    assert paths == relative_paths("train")
    assert len({path.split("/")[0] for path in paths[:20]}) > 10


def test_order_and_split_do_not_depend_on_the_folder(
    fake_stdlib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [path.name for path in text.stdlib_files("held_out")]
    moved = fake_stdlib.rename(fake_stdlib.with_name("elsewhere"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(moved)})
    assert [path.name for path in text.stdlib_files("held_out")] == before


def test_only_the_library_itself_is_listed() -> None:
    for path in relative_paths("train") + relative_paths("held_out"):
        folders = set(path.split("/")[:-1])
        assert not folders & {"site-packages", "test", "tests", "__pycache__", "encodings"}, path
        assert not path.startswith("_sysconfigdata"), path


def test_dataset_has_one_row_per_file_in_the_order_of_the_listing() -> None:
    rows = text.dataset("held_out")
    assert rows.column_names == ["text", "path"]
    listed = relative_paths("held_out")
    assert rows["path"][:] == [path for path in listed if path in set(rows["path"])]
    assert len(rows) > 0.8 * len(listed)
    by_path = dict(zip(rows["path"], rows["text"], strict=True))
    assert "def lru_cache(" in by_path["functools.py"]
    assert rows[:] == text.dataset("held_out")[:]


def test_dataset_leaves_out_empty_and_undecodable_files(fake_stdlib: Path) -> None:
    empty, undecodable = (path.name for path in text.stdlib_files("train")[:2])
    (fake_stdlib / empty).write_text("\n")
    (fake_stdlib / undecodable).write_bytes(b"name = '\xe9'\n")
    paths = set(text.dataset("train")["path"])
    assert len(paths) == len(text.stdlib_files("train")) - 2
    assert not paths & {empty, undecodable}


@pytest.mark.parametrize("folder", ["empty", "missing.zip"])
def test_missing_sources_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / folder)})
    with pytest.raises(FileNotFoundError, match="zipped or stripped"):
        text.dataset("train")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out"):
        text.stdlib_files("test")  # type: ignore[arg-type]
