"""Two runs cannot share a folder, and a dead one does not hold it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saelens_matryoshka.runs.lock import is_locked, locked

HOLD = """
import sys, time
from pathlib import Path
from filelock import FileLock
with FileLock(Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["plain", "two words", "größe-套娃"])
def test_second_is_refused_while_the_first_lives(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"{name}' is in use: another process"), locked(folder):
            pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with locked(folder):
            pass
    finally:
        first.kill()
        first.wait()


def test_lock_is_for_one_holder_within_a_process_too(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="is in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_look_at_who_holds_a_folder_does_not_keep_another_from_it(tmp_path: Path) -> None:
    """`runs` lists a folder in the instant in which a run begins in it."""
    (tmp_path / ".lock").touch()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            is_locked(tmp_path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            with locked(tmp_path):
                pass
    finally:
        done.set()
        looking.join()


def test_symlink_to_a_locked_folder_is_locked(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="is in use"), locked(tmp_path / "link"):
        pass


def test_folder_that_cannot_be_written_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a file in place of the lock's parent: chmod would not stop root
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' cannot be locked"), locked(tmp_path / "file"):
        pass
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:

        def refused(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("filelock.FileLock._acquire", refused)
    with pytest.raises(ValueError, match="read-only' cannot be locked.*Permission denied"), locked(folder):
        pass
