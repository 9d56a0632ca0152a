from __future__ import annotations

import os
from pathlib import Path

import pytest

from saelens_matryoshka.atomic import write_atomically


def test_a_file_is_written_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_what_was_there_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def broken(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
