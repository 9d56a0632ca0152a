from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saelens_matryoshka import atomic
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


def test_a_text_is_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    program = (
        "import pathlib, runpy; "
        f"write = runpy.run_path({atomic.__file__!r})['write_atomically']; "
        f"write(pathlib.Path({str(path)!r}), '\\u2192\\n')"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | ascii_only, check=True)
    assert path.read_bytes() == "\u2192\n".encode()
