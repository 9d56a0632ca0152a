"""The folder of a training run, and what lies where in it."""

from __future__ import annotations

import itertools
import re
import shlex
import unicodedata
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from saelens_matryoshka.files.atomic import is_left_aside, obstacle, write_atomically
from saelens_matryoshka.files.names import is_reserved, unreserved
from saelens_matryoshka.files.plain_yaml import plain_values
from saelens_matryoshka.runs.fields import Given
from saelens_matryoshka.runs.lock import LOCK
from saelens_matryoshka.runs.settings import RECORDS, Settings

# Not in a file's name on Windows, and no good idea elsewhere.
_HOSTILE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_LONGEST_NAME = 120


@dataclass(frozen=True)
class RunFolder:
    """`results/{model}/{mapping}/{name}/`. The saved SAE lies in it directly, as SAELens saves it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_log(self) -> Path:
        """One JSON object a line, written as the run trains."""
        return self.path / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        """The evaluation of every prefix after training."""
        return self.path / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint, named by the number of tokens trained on."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Examples of each latent."""
        return self.path / "samples"

    @property
    def report(self) -> Path:
        """The run as a page."""
        return self.path / "report.html"

    def require_unused(self) -> None:
        """Refuse a folder that holds anything.

        Raises:
            ValueError: it does, or is a file, or cannot be made.
        """
        if not self.path.exists() and (fault := obstacle(self.path)):
            raise ValueError(f"{self.path} cannot be made: {fault}. Choose another --out.")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, and was to be the run's folder: choose another --name.")
        if not self.path.exists() or all(
            child.name == LOCK or is_left_aside(child) for child in self.path.iterdir()
        ):
            return
        if not self.config.exists():
            raise ValueError(f"{self.path} holds other files. Choose another --name or --out.")
        if self.is_run() and self.read().get("completed_at"):
            raise ValueError(
                f"{self.path} holds a finished run. Choose another --name, or move that folder away."
            )
        raise ValueError(
            f"{self.path} holds a run that is not finished. Go on with `train --resume "
            f"{shlex.quote(str(self.path))}`, or choose another --name."
        )

    def is_run(self) -> bool:
        """Whether its config.yaml is that of a run."""
        try:
            return "started_at" in self.read()
        except ValueError:
            return False

    def write_config(self, settings: Settings, **records: Any) -> None:
        """Write the settings, and what there is to say about the run beside them (see `RECORDS`).

        `train --config RUN/config.yaml` repeats the run.
        """
        values = settings.values()
        given = {name: values[name] for name in settings.given if name in values}
        origins = {name: one.origin for name, one in settings.given.items()}
        lines = ["# `saelens-matryoshka train --config THIS_FILE` repeats this run, in a folder of its own."]
        for name, value in given.items():
            lines.append(f"{_line(name, value)}  # {' '.join(origins[name].split())}")
        lines += ["", "# SAELens's defaults"]
        lines += [_line(name, value) for name, value in values.items() if name not in given]
        lines += ["", "# about the run", *(_line(name, value) for name, value in records.items())]
        write_atomically(self.config, "\n".join(lines) + "\n")

    def add_record(self, name: str, value: Any) -> None:
        """Say something about the run in config.yaml, in place of what it said of that name before."""
        assert name in RECORDS
        lines = self.config.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith(f"{name}:")]
        write_atomically(self.config, "\n".join([*kept, _line(name, value)]) + "\n")

    def read(self) -> dict[str, Any]:
        """config.yaml as a dictionary: settings by name, and the records.

        Raises:
            ValueError: it is not there, or is not what `write_config` wrote.
        """
        try:
            found = plain_values(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} is not the folder of a run: {self._what_is_wrong()}.")
        return found

    def _what_is_wrong(self) -> str:
        if not self.path.is_dir():
            return "there is no such folder"
        if self.config.exists():
            return f"its {self.config.name} is damaged"
        missing = f"it has no {self.config.name}"
        around = (path for path in self.path.resolve().parents if RunFolder(path).is_run())
        if (outer := next(around, None)) is not None:
            return f"{missing}. It is part of the run {outer}"
        if inside := sorted(path.parent.name for path in self.path.glob(f"*/{self.config.name}")):
            return f"{missing}. Name one of those in it: {', '.join(inside[:5])}"
        return missing

    def settings(self) -> dict[str, Given]:
        """The settings, as a source for `saelens_matryoshka.runs.settings.resolve`."""
        origin = str(self.config)
        return {name: Given(value, origin) for name, value in self.read().items() if name not in RECORDS}


def run_folder(out: Path, model_name: str, mapping: str, name: str) -> RunFolder:
    """`out/{model}/{mapping}/{name}`, the first two made fit to be names of folders.

    Raises:
        ValueError: `name` is not fit to be one.
    """
    require_name(name)
    model = Path(model_name).name if Path(model_name).is_dir() else model_name
    return RunFolder(out / _fit(model) / _fit(mapping) / unicodedata.normalize("NFC", name))


def new_run_folder(out: Path, settings: Settings) -> RunFolder:
    """A folder that is not there yet, whose name says what is trained and when it was started."""
    sae = settings.cfg.sae
    name = f"{sae.d_sae}-k{sae.k:g}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        unique = name if number == 1 else f"{name}-{number}"
        folder = run_folder(out, settings.cfg.model_name, settings.mapping, unique)
        if not folder.path.exists():
            return folder
    raise AssertionError


def require_name(name: str) -> None:
    """Refuse a name that is no good for a folder, here or where the folder may be copied to.

    Raises:
        ValueError: it is empty, too long, or what some system does not take.
    """
    if not name.strip():
        raise ValueError("--name is empty.")
    if found := _HOSTILE.search(name):
        raise ValueError(f"--name {name!r}: {found[0]!r} cannot be in the name of a folder everywhere.")
    if name != name.strip() or name[0] in ".-" or name[-1] == ".":
        raise ValueError(
            f"--name {name!r} must not start with a dot, a dash or a space, nor end with a dot or a space."
        )
    if is_reserved(name):
        raise ValueError(f"--name {name!r} is reserved on Windows: choose another.")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"--name is {len(name.encode())} bytes long: at most {_LONGEST_NAME}.")


def _fit(name: str) -> str:
    """A name like google/gemma-2-2b as the name of a folder."""
    name = _HOSTILE.sub("_", unicodedata.normalize("NFC", name).strip("/").replace("/", "--"))
    return unreserved(name.strip(" .") or "_")


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _line(name: str, value: Any) -> str:
    """One entry of a YAML mapping, on one line."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump({name: value}, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.strip()[1:-1]
