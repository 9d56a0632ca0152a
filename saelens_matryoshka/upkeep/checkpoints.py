"""Checkpoints of a run: whole or not there, with checksums, and no more of them than wanted.

A checkpoint is a folder named by the number of tokens trained on, in SAELens's layout, so that SAELens's own
`resume_from_checkpoint` takes it too. It is written into a folder aside, forced to the disk and renamed:
whatever ends the process, a checkpoint under its own name is whole. `manifest.json` has the SHA-256 of each
file and the versions of the packages; it is checked before a checkpoint is used.

`trainer_state.pt` is the only torch file in it, because SAELens reads it; torch.load reads it with
`weights_only=True`, that is without running code from it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAETrainer
from sae_lens.constants import SPARSITY_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import save_file

from saelens_matryoshka.files.fingerprint import hash_of_file
from saelens_matryoshka.versions import package_versions

MANIFEST = "manifest.json"
_ASIDE = ".aside-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those before it are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path
    n_steps: int
    n_tokens: int
    versions: dict[str, str]


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: Path, keep: int = 2, logs: Sequence[Path] = ()) -> None:
        """The checkpoints of a run.

        Args:
            folder: Which is made when the first one is written.
            keep: How many are kept, the newest ones; 0 for all.
            logs: Files that must not be behind a checkpoint, whatever ends the machine.
        """
        if keep < 0:
            raise ValueError(f"keep={keep} must be the number of checkpoints to keep, or 0 for all.")
        self.folder, self.keep, self.logs = folder, keep, logs

    def save(self, trainer: SAETrainer[Any, Any]) -> Path:
        """Write a checkpoint of a trainer between two steps.

        Raises:
            CheckpointError: it could not be written; what was there is as it was.
        """
        path = self.folder / str(trainer.n_training_samples)
        if path.exists() and why_unusable(path) is None:
            return path
        aside = self.folder / f"{_ASIDE}{uuid.uuid4().hex}"
        try:
            aside.mkdir(parents=True)
            _write(trainer, aside)
            _seal(aside, trainer)
            for log in self.logs:
                if log.exists():
                    _sync(log)
            if path.exists():  # damaged
                self._remove(path)
            os.rename(aside, path)
            _sync(self.folder)
        except Exception as error:
            free = _free(aside)
            shutil.rmtree(aside, ignore_errors=True)
            last = self.newest()
            raise CheckpointError(
                f"The checkpoint {path} could not be written{free}: {error}. "
                + (f"The last good one is {last.path}." if last else "There is none before it.")
            ) from error
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._prune(trainer.n_training_samples)
        return path

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; with a warning for each newer one that is damaged."""
        for path in self.paths():
            why = why_unusable(path)
            if why is None:
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                return Checkpoint(path, manifest["n_steps"], manifest["n_tokens"], manifest["versions"])
            warnings.warn(f"The checkpoint {path} is passed over: {why}.", stacklevel=2)
        return None

    def clean(self) -> None:
        """Remove what a process left behind that was killed while it wrote or removed a checkpoint."""
        for path in self.folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)

    def paths(self) -> list[Path]:
        """The folders of all that there are, newest first; each is named by the tokens trained on."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def _prune(self, n_tokens: int) -> None:
        # Newer ones than the one just written are damaged, or it would not be written again: they do not
        # count, and go when it is their turn.
        past = [path for path in self.paths() if int(path.name) <= n_tokens]
        for path in past[self.keep :] if self.keep else []:
            with suppress(OSError):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        aside = self.folder / f"{_ASIDE}{uuid.uuid4().hex}"
        os.rename(path, aside)  # so that a half-removed checkpoint has no name
        shutil.rmtree(aside, ignore_errors=True)


def why_unusable(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, sha256 in files.items():
            if hash_of_file(path / name) != sha256:
                return f"{name} is damaged (its SHA-256 is not the one in {MANIFEST})"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    has_state = any(Path(name).name == TRAINER_STATE_FILENAME for name in files)
    return None if has_state else f"{TRAINER_STATE_FILENAME} is missing"


def warn_of_other_versions(checkpoint: Checkpoint) -> None:
    """Say so if a checkpoint was written with other packages: the result may differ in the last bits."""
    ours = package_versions()
    differ = [
        f"{name} {checkpoint.versions.get(name)} there, {ours[name]} here"
        for name in ours
        if checkpoint.versions.get(name) != ours[name]
    ]
    if differ:
        warnings.warn(
            f"The checkpoint {checkpoint.path} was written with other versions ({'; '.join(differ)}): "
            "training goes on, but not necessarily to the last bit as it would have.",
            stacklevel=2,
        )


def _write(trainer: SAETrainer[Any, Any], folder: Path) -> None:
    """What SAELens puts into a checkpoint, without its upload to W&B in the middle.

    Of trainers in lockstep, each has a folder, and what they share lies beside these.
    """
    if isinstance(trainer, MultiSAETrainer):
        for name, one in trainer.trainers.items():
            (folder / name).mkdir()
            _write(one, folder / name)
        if trainer.save_checkpoint_fn is not None:
            trainer.save_checkpoint_fn(checkpoint_path=folder)
        return
    trainer.sae.save_model(folder)
    save_file({"sparsity": trainer.log_feature_sparsity}, folder / SPARSITY_FILENAME)
    trainer.save_trainer_state(folder)
    if trainer.save_checkpoint_fn is not None:
        trainer.save_checkpoint_fn(checkpoint_path=folder)


def _seal(folder: Path, trainer: SAETrainer[Any, Any]) -> None:
    """Write the manifest, and force everything to the disk."""
    found = sorted(folder.rglob("*"))
    files = [path for path in found if path.is_file()]
    manifest = {
        "n_steps": trainer.n_training_steps,
        "n_tokens": trainer.n_training_samples,
        "versions": package_versions(),
        "files": {path.relative_to(folder).as_posix(): hash_of_file(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*found, folder / MANIFEST, folder]:
        _sync(path)


def _free(folder: Path) -> str:
    """How much room there is, in words: torch's error does not say that a disk is full."""
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free)"
    except OSError:  # it has gone
        return ""


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
