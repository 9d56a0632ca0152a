from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saelens_matryoshka.saebench.process import complete_cache, scratch_folder
from tests.forked import run_function


def _killed(out: Path) -> None:
    with scratch_folder(out) as folder:
        (folder / "cache").mkdir()
        os._exit(9)


def test_what_a_killed_process_needed_is_removed_and_what_another_needs_is_not(tmp_path: Path) -> None:
    assert run_function(_killed, tmp_path, cwd=tmp_path).returncode == 9
    assert len(list(tmp_path.glob(".running-*/cache"))) == 1
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert {path for path in tmp_path.iterdir() if path.is_dir()} == {first, second}
    assert list(tmp_path.iterdir()) == []


def test_who_wants_a_cache_that_another_fills_waits_and_finds_it_complete(tmp_path: Path) -> None:
    filling, may_end = threading.Event(), threading.Event()

    def fill() -> None:
        with complete_cache(tmp_path / "tpp-abc") as folder:
            filling.set()
            may_end.wait(timeout=0.5)
            (folder / "probes.pkl").write_text("hours of work")

    def use() -> str:
        assert filling.wait(timeout=10)
        with complete_cache(tmp_path / "tpp-abc") as folder:
            may_end.set()
            return (folder / "probes.pkl").read_text()

    with ThreadPoolExecutor(2) as pool:
        filled, used = pool.submit(fill), pool.submit(use)
        filled.result()
        assert used.result() == "hours of work"


def test_what_was_left_half_written_is_removed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with complete_cache(tmp_path / "tpp-abc") as folder:
            (folder / "probes.pkl").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with complete_cache(tmp_path / "tpp-abc") as folder:
        assert list(folder.iterdir()) == []
