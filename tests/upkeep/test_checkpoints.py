"""A checkpoint is whole, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer

import saelens_matryoshka as sm
from saelens_matryoshka.upkeep import checkpoints as module
from saelens_matryoshka.upkeep.checkpoints import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    warn_of_other_versions,
    why_unusable,
)
from tests.helpers import sparse_batches, trainer_for


def _trainer(n_steps: int = 0, d_sae: int = 16) -> SAETrainer[Any, Any]:
    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(d_in=8, d_sae=d_sae, k=2, matryoshka_widths=[4, d_sae])
    )
    trainer = trainer_for(sae, sparse_batches(4, 32, 8))
    _step(trainer, n_steps)
    return trainer


def _step(trainer: SAETrainer[Any, Any], n_steps: int = 1) -> None:
    for batch in sparse_batches(n_steps, 32, 8):
        trainer.step(batch)
        trainer.n_training_steps += 1


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "name", ["plain", "two words", "größe-Матрёшка-套娃", "a" * 100, 'it\'s $HOME & "co"']
)
def test_checkpoint_is_named_by_its_tokens_and_found_again(name: str, tmp_path: Path) -> None:
    kept, trainer = Checkpoints(tmp_path / name), _trainer(3)
    path = kept.save(trainer)
    assert path == tmp_path / name / "96"
    newest = kept.newest()
    assert newest is not None
    assert (newest.path, newest.n_steps, newest.n_tokens) == (path, 3, 96)
    assert newest.versions.keys() >= {"python", "sae-lens", "torch", "numpy"}
    assert why_unusable(path) is None


def test_folder_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "big disk")
    path = Checkpoints(tmp_path / "checkpoints").save(_trainer(1))
    assert why_unusable(path) is None
    assert _names(tmp_path / "big disk") == ["32"]


@pytest.mark.parametrize(
    ("keep", "left"), [(1, ["160"]), (2, ["128", "160"]), (0, ["32", "64", "96", "128", "160"])]
)
def test_only_the_newest_are_kept(keep: int, left: list[str], tmp_path: Path) -> None:
    kept, trainer = Checkpoints(tmp_path, keep), _trainer()
    for _ in range(5):
        _step(trainer)
        kept.save(trainer)
    assert _names(tmp_path) == sorted(left)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "one bit": _flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file",
    ["sae_weights.safetensors", "trainer_state.pt", "training_state.safetensors", "cfg.json", MANIFEST],
)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    damage: str, file: str, tmp_path: Path
) -> None:
    kept, trainer = Checkpoints(tmp_path), _trainer(1)
    first = kept.save(trainer)
    _step(trainer)
    second = kept.save(trainer)
    DAMAGES[damage](second / file)
    if (file, damage) == (MANIFEST, "one bit"):
        (second / MANIFEST).write_text("[]")
    with pytest.warns(UserWarning, match=rf"{second} is passed over: {file} "):
        newest = kept.newest()
    assert newest is not None
    assert newest.path == first
    kept.save(trainer)  # the damaged one is replaced
    assert why_unusable(second) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_a_new_checkpoint_is_kept_beside_damaged_ones_of_later_steps(keep: int, tmp_path: Path) -> None:
    """All were damaged, and the run has started anew."""
    kept, trainer = Checkpoints(tmp_path, keep), _trainer(4)
    for _ in range(keep):
        _step(trainer)
        _truncate(kept.save(trainer) / "cfg.json")
    path = kept.save(_trainer(1))
    with pytest.warns(UserWarning, match="is passed over"):
        newest = kept.newest()
    assert newest is not None
    assert newest.path == path
    _step(trainer)
    kept.save(trainer)
    assert len(_names(tmp_path)) == keep


def test_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest() is None


def test_torch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """`trainer_state.pt` is read by SAELens; its torch.load must not run what is in it."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = Checkpoints(tmp_path).save(_trainer(1))
    torch.save({"optimizer": Evil()}, path / "trainer_state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        _trainer().load_trainer_state(path)
    assert not (tmp_path / "pwned").exists()


def test_nothing_in_a_checkpoint_is_a_pickle_but_saelens_s_trainer_state(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(_trainer(1))
    others = {name for name in _names(path) if not name.endswith((".json", ".safetensors"))}
    assert others == {"trainer_state.pt"}
    torch.load(path / "trainer_state.pt", weights_only=True)


POINTS = {
    "weights": (sm.MatryoshkaTrainingSAE, "save_model"),
    "sparsity": (module, "save_file"),
    "trainer state": (SAETrainer, "save_trainer_state"),
    "manifest": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
}


@pytest.mark.parametrize("point", POINTS)
def test_full_disk_leaves_the_last_good_checkpoint(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, trainer = Checkpoints(tmp_path), _trainer(1)
    first = kept.save(trainer)
    _step(trainer)

    def full(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*POINTS[point], full)
        with pytest.raises(CheckpointError, match=rf"No space left.*The last good one is {first}"):
            kept.save(trainer)
    assert _names(tmp_path) == ["32"]
    assert why_unusable(first) is None
    assert kept.save(trainer).name == "64"  # there is space again


def test_a_damaged_checkpoint_is_not_told_as_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, trainer = Checkpoints(tmp_path), _trainer(1)
    first = kept.save(trainer)
    _step(trainer)
    _truncate(kept.save(trainer) / "cfg.json")
    _step(trainer)

    def full(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*POINTS["rename"], full)
    with (
        pytest.warns(UserWarning, match="64 is passed over"),
        pytest.raises(CheckpointError, match=rf"The last good one is {first}\."),
    ):
        kept.save(trainer)


def test_really_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """On a file system of its own, with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("cannot mount a tmpfs here")
    try:
        trainer = _trainer(1, d_sae=5000)
        kept = Checkpoints(disk)
        with pytest.raises(CheckpointError, match=r"\(0 MB are free\): .* There is none before it"):
            kept.save(trainer)
        assert _names(disk) == []
        small = _trainer(1, d_sae=3000)
        first = kept.save(small)
        _step(small)
        with pytest.raises(CheckpointError, match=str(first)):
            kept.save(small)
        assert why_unusable(first) is None
        assert _names(disk) == ["32"]
    finally:
        subprocess.call(["umount", disk])


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(_trainer(1))
    (tmp_path / ".aside-123").mkdir()
    (tmp_path / ".aside-123" / "half.safetensors").write_bytes(b"half")
    assert kept.newest() is not None
    kept.clean()
    assert _names(tmp_path) == ["32"]


def test_other_versions_are_told(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    path = kept.save(_trainer(1))
    checkpoint = kept.newest()
    assert checkpoint is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_versions(checkpoint)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["versions"]["torch"] = "1.0"
    (path / MANIFEST).write_text(json.dumps(manifest))
    changed = kept.newest()
    assert changed is not None
    with pytest.warns(UserWarning, match="torch 1.0 there"):
        warn_of_other_versions(changed)


def test_keep_must_be_a_number_of_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=-1"):
        Checkpoints(tmp_path, keep=-1)
