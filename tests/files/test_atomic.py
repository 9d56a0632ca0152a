from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saelens_matryoshka.cache.writer import require_own_folder
from saelens_matryoshka.files import atomic
from saelens_matryoshka.files.atomic import is_left_aside, whole_folder, write_atomically
from saelens_matryoshka.runs.folder import RunFolder


def test_a_file_is_written_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    write_atomically(tmp_path / f"{'é' * 125}.json", "x")
    with whole_folder(tmp_path / ("x" * 255)):
        pass
    assert sorted(len(path.name) for path in tmp_path.iterdir()) == [130, 255]


def test_a_link_still_leads_to_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "file.json"
    link.symlink_to(tmp_path / "elsewhere" / "target.json")
    for content in ("one", "two"):
        write_atomically(link, content)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["target.json"]
        assert link.read_text() == content


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


def test_a_full_disk_is_told_with_the_file_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file.json'}'"):
        write_atomically(tmp_path / "file.json", "x")
    assert not list(tmp_path.iterdir())


def test_what_takes_the_name_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size) or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_atomically(tmp_path / "file.json", "four")
    assert calls == [4, "replace"]


@pytest.mark.parametrize("require", [require_own_folder, lambda folder: RunFolder(folder).require_unused()])
@pytest.mark.parametrize("file", ["config.yaml", "manifest.json"])
def test_what_a_killed_process_left_does_not_make_a_folder_used(
    file: str, require: Callable[[Path], None], tmp_path: Path
) -> None:
    """The same command can be given again."""
    program = (
        "import os, pathlib, runpy; os.replace = lambda *_: os._exit(1); "
        f"write = runpy.run_path({atomic.__file__!r})['write_atomically']; "
        f"write(pathlib.Path({str(tmp_path / file)!r}), 'content')"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert [path.name.startswith(f".{file}.") for path in tmp_path.iterdir()] == [True]
    require(tmp_path)


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


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="stop"), whole_folder(out) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    assert list((tmp_path / "deep").iterdir()) == []
    out.mkdir()
    with whole_folder(out) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert out.stat().st_mode == (tmp_path / "deep").stat().st_mode
    with pytest.raises(FileExistsError, match="not empty"), whole_folder(out):
        pass
    assert [path.name for path in out.iterdir()] == ["whole"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=str(out)) as full, whole_folder(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.errno == errno.ENOSPC
    with (
        pytest.raises(OSError, match=f"{out} was not written: .*while serializing"),
        whole_folder(out) as new,
    ):
        save_file({"W_enc": torch.zeros(1)}, new / "missing" / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="not empty"), whole_folder(out) as folder:  # noqa: PT012
        (folder / "ours").write_text("x")
        out.mkdir()
        (out / "theirs").write_text("x")
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]


def test_an_overwritten_folder_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    (out / "old").write_text("x")
    link.symlink_to(out)
    with pytest.raises(RuntimeError, match="stop"), whole_folder(link, overwrite=True):
        raise RuntimeError("stop")
    assert [path.name for path in out.iterdir()] == ["old"]
    with whole_folder(link, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


def test_an_overwritten_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace, calls = tmp_path / "out", os.replace, 0
    out.mkdir()
    (out / "old").write_text("x")

    def second_fails(*paths: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("disk")
        replace(*paths)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="disk"), whole_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in out.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_kill_between_the_renames_leaves_both_folders_and_says_which_is_which(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").write_text("x")
    program = (
        "import os, pathlib, runpy; replace = os.replace\n"
        "def replace_and_die(*paths): replace(*paths); os._exit(1)\n"
        f"os.replace = replace_and_die; whole = runpy.run_path({atomic.__file__!r})['whole_folder']\n"
        f"with whole(pathlib.Path({str(tmp_path / 'out')!r}), overwrite=True) as folder:\n"
        "    (folder / 'after').write_text('x')"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    (old,), (new,) = tmp_path.glob(".out.old.*"), tmp_path.glob(".out.new.*")
    assert is_left_aside(old)
    assert is_left_aside(new)
    assert [path.name for path in old.iterdir()] == ["before"]
    assert [path.name for path in new.iterdir()] == ["after"]


def test_an_old_folder_that_cannot_be_removed_is_no_failure_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rmdir = tmp_path / "out", os.rmdir
    (out / "held").mkdir(parents=True)

    def held(path: str, **options: Any) -> None:
        if "held" in str(path):
            raise PermissionError(path)
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", held)
    with whole_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"), whole_folder(tmp_path / "file", overwrite=True):
        pass
    assert (tmp_path / "file").read_text() == "x"
