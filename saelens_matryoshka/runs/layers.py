"""Several runs in lockstep, each in a run folder of its own, all in one parent folder.

`PARENT/mlp-0/`, `PARENT/mlp-1/`, ... are run folders as any other; `PARENT/checkpoints/` has the checkpoints
of all together. The same call again goes on where it stopped, and leaves out what is finished.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.layers import train_layers
from saelens_matryoshka.layers.lockstep import require_common
from saelens_matryoshka.runs.fields import Given
from saelens_matryoshka.runs.folder import RunFolder, now, require_name
from saelens_matryoshka.runs.lock import LOCK, locked
from saelens_matryoshka.runs.metrics_log import MetricsLog
from saelens_matryoshka.runs.settings import Settings, SettingsSource, resolve
from saelens_matryoshka.runs.training import (
    evaluate_run,
    overrides,
    recorded_upkeep,
    remove_final_files,
    upkeep_record,
    wandb_in,
)
from saelens_matryoshka.upkeep.checkpoints import Checkpoints, warn_of_other_versions
from saelens_matryoshka.upkeep.keeper import Keeper, Upkeep, after_training
from saelens_matryoshka.versions import package_versions

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LONGEST_LABEL = 60
# Settings of a run alone, and what takes their place where runs are trained together.
_OF_ONE_RUN = {
    "output_path": "each has a folder in that of all, which --out and --name choose",
    "resume_from_checkpoint": "the command that began them goes on, given again",
}


def parse_layers(text: str) -> list[int]:
    """Layers from "0-25", "0,4,8" or a mix of both.

    Raises:
        ValueError: it is none of these, or names a layer twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--layers {text!r} must be a range like 0-25, a list like 0,4,8, or both.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"--layers {text!r} names a layer twice.")
    return found


def each_of(layers: str | None, mapping: str | None, runs: Any = None) -> list[dict[str, Given]]:
    """What sets each run apart: the products of layers and mappings, or the entries of a file's `runs`.

    Args:
        layers: As `parse_layers` takes them.
        mapping: One, or several with commas between.
        runs: A list of settings of single runs.

    Raises:
        ValueError: there is nothing to tell runs apart by, or `runs` is no list of settings.
    """
    if runs is not None:
        for flag, given in (("--layers", layers), ("--mapping", mapping)):
            if given is not None:
                raise ValueError(f"{flag} and the file's `runs` both say what to train: give one of them.")
        if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
            raise ValueError("`runs` must be a list of settings, e.g. `- {mapping: mlp, layer: 3}`.")
        return [
            {name: Given(value, f"runs[{i}]") for name, value in run.items()} for i, run in enumerate(runs)
        ]
    found: list[dict[str, Given]] = []
    for name in [None] if mapping is None else [part.strip() for part in mapping.split(",")]:
        chosen = {} if name is None else {"mapping": Given(name, "flag")}
        if name is not None and name.startswith("cross-layer"):  # names its layers itself
            found.append(chosen)
            continue
        if layers is None:
            raise ValueError(f"--layers is needed with --mapping {mapping}.")
        found += [{**chosen, "layer": Given(layer, "flag")} for layer in parse_layers(layers)]
    return found


def resolve_many(
    sources: Sequence[SettingsSource], each: Sequence[SettingsSource], *, recommended: bool = True
) -> dict[str, Settings]:
    """The settings of every run, by the name of its folder.

    Args:
        sources: Common to all, lowest first.
        each: What is given of each on top; `name` is its folder's, by default its mapping.
        recommended: As in `resolve`.

    Raises:
        ValueError: as in `resolve`, or two would have the same folder, or they cannot be trained together.
    """
    found: dict[str, Settings] = {}
    for one in each:
        own = dict(one)
        name = own.pop("name", None)
        settings = resolve([*sources, own], recommended=recommended)
        _require_nothing_of_one_run(settings)
        label = re.sub(r"[^\w.,+-]", "_", settings.mapping) if name is None else str(name.value)
        require_name(label)
        if label in found:
            raise ValueError(f"Two of the runs would be in a folder {label!r}: give each a `name`.")
        found[label] = settings
    require_common({name: settings.cfg for name, settings in found.items()})
    return found


def _require_nothing_of_one_run(settings: Settings) -> None:
    for name, instead in _OF_ONE_RUN.items():
        if name in settings.given and settings.given[name].value is not None:
            called = settings.given[name].called(name)
            raise ValueError(f"{called} is of a run that is trained alone: of several, {instead}.")


def label_of(names: Sequence[str]) -> str:
    """A name for the parent of runs: "mlp-0-11", "mlp-0,4,8", or how many they are."""
    matches = [re.fullmatch(r"(.+)-(\d+)", name) for name in names]
    stems = {match[1] if match else None for match in matches}
    if len(names) > 1 and len(stems) == 1 and None not in stems:
        numbers = [int(match[2]) for match in matches if match]
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        listed = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))
        label = f"{stems.pop()}-{listed}"
    else:
        label = "+".join(names)
    return label if len(label) <= _LONGEST_LABEL else f"{len(names)}-runs"


def train_many(
    settings: Mapping[str, Settings],
    parent: Path,
    *,
    log_every: int = 20,
    upkeep: Upkeep | None = None,
    command: Sequence[str] = (),
    on_start: Callable[[int], None] = lambda _: None,
) -> dict[str, EvalResult | None]:
    """Train several runs in lockstep, or go on with them.

    Args:
        settings: By name, as `resolve_many` gives them.
        parent: Their parent folder.
        log_every: Steps between two lines of each metrics.jsonl.
        upkeep: How their state is kept.
        command: What was called, for the record.
        on_start: Called with the step that the runs begin or go on after, once it is known that they can.

    Returns:
        The evaluation of each run that was trained now; None where no text was held out.

    Raises:
        ValueError: a folder holds a run with other settings, or settings do not go together or do not fit.
        RunStopped: a signal or an error has ended it; the same call goes on.
    """
    if parent.exists() and not parent.is_dir():
        raise ValueError(f"{parent} is a file, and was to be the folder of the runs: choose another --name.")
    if RunFolder(parent).config.is_file():
        raise ValueError(f"{parent} is the folder of a single run: choose another --name.")
    folders = {name: RunFolder(parent / name) for name in settings}
    for name, folder in folders.items():
        require_same_run(folder, settings[name])
    was_there = parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(parent):
            finished = {name for name, folder in folders.items() if _is_finished(folder)}
            if len(finished) == len(folders):
                return {}
            return _train(
                settings, parent, folders, finished, log_every, upkeep or Upkeep(), command, on_start
            )
    finally:
        if not was_there:  # nothing is left behind by what was refused
            _remove_if_unused(parent)


def _train(
    settings: Mapping[str, Settings],
    parent: Path,
    folders: Mapping[str, RunFolder],
    finished: set[str],
    log_every: int,
    upkeep: Upkeep,
    command: Sequence[str],
    on_start: Callable[[int], None],
) -> dict[str, EvalResult | None]:
    logs = [folder.metrics_log for folder in folders.values()]
    checkpoints = Checkpoints(RunFolder(parent).checkpoints, upkeep.keep, logs)
    checkpoints.clean()
    newest = checkpoints.newest()
    if newest is not None:
        warn_of_other_versions(newest)
    on_start(0 if newest is None else newest.n_steps)
    for name in folders.keys() - finished:
        remove_final_files(folders[name])
    first = next(iter(settings.values()))
    wandb_id = first.cfg.logger.wandb_id or _recorded_wandb_id(folders, finished) or uuid.uuid4().hex[:8]
    for name, one in settings.items():
        one.cfg.output_path = str(folders[name].path)
        one.cfg.checkpoint_path = str(checkpoints.folder)
        one.cfg.logger.wandb_id = wandb_id
        if "run_name" not in one.given:
            one.cfg.logger.run_name = parent.name

    def begin() -> None:
        for name, folder in folders.items():
            if folder.config.is_file():
                continue
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_config(
                settings[name],
                command=list(command),
                versions=package_versions(),
                wandb={"id": wandb_id} if first.cfg.logger.log_to_wandb else None,
                upkeep=upkeep_record(log_every, upkeep),
                lockstep=list(folders),
                started_at=now(),
            )

    torch.manual_seed(first.cfg.seed)
    with wandb_in(RunFolder(parent)):
        runners = train_layers(
            {name: one.cfg for name, one in settings.items()},
            observers={name: [MetricsLog(folder.metrics_log, log_every)] for name, folder in folders.items()},
            keeper=Keeper(checkpoints, minutes=upkeep.checkpoint_minutes),
            may_skip=upkeep.skip_bad_batches,
            resume_from=None if newest is None else newest.path,
            finished=finished.__contains__,
            on_start=begin,
            **overrides(first),
        )
    results: dict[str, EvalResult | None] = {}
    for name, runner in runners.items():
        with after_training():
            results[name] = evaluate_run(runner, folders[name])
            folders[name].add_record("completed_at", now())
    return results


def runs_in(parent: Path) -> list[str]:
    """The names of the runs that are trained in lockstep in a parent folder; none if it is not one.

    In the order in which they were given, by which the first steps' random numbers are drawn.
    """
    if not parent.is_dir() or RunFolder(parent).config.is_file():
        return []
    folders = [folder for path in sorted(parent.iterdir()) if (folder := RunFolder(path)).config.is_file()]
    found = {folder.path.name: names for folder in folders if (names := folder.read().get("lockstep"))}
    given = max((names for names in found.values() if isinstance(names, list)), key=len, default=[])
    return [*given, *(name for name in found if name not in given)]


def resume_many(
    parent: Path, *, on_start: Callable[[int], None] = lambda _: None, **upkeep: Any
) -> dict[str, EvalResult | None]:
    """Go on with the runs in a parent folder, with their own settings.

    Args:
        parent: As it was given to `train_many`.
        on_start: As `train_many`.
        **upkeep: Fields of `Upkeep` that are to be other than at their start.

    Raises:
        ValueError: all are finished, or one has no folder.
        RunStopped: as `train_many`.
    """
    folders = {name: RunFolder(parent / name) for name in runs_in(parent)}
    unfinished = [folder for folder in folders.values() if not _is_finished(folder)]
    if not unfinished:
        raise ValueError(f"{parent} holds finished runs: there is nothing to go on with.")
    if missing := [name for name, folder in folders.items() if not folder.config.is_file()]:
        raise ValueError(
            f"{parent} has no run {missing[0]!r}, which is trained together with those that it has. To begin "
            "it too, give the command again with which they were begun."
        )
    log_every, kept = recorded_upkeep(unfinished[0].read(), upkeep)
    settings = {name: resolve([folder.settings()]) for name, folder in folders.items()}
    return train_many(settings, parent, log_every=log_every, upkeep=kept, on_start=on_start)


def require_same_run(folder: RunFolder, settings: Settings) -> None:
    """Refuse a folder that holds something else than this run.

    Raises:
        ValueError: it does; the message names a setting that differs.
    """
    if not folder.path.exists():
        return
    if not folder.config.is_file():
        folder.require_unused()
        return
    if not folder.read().get("lockstep"):
        raise ValueError(
            f"{folder.path} holds a run that is trained alone. Choose another --name, or move that folder "
            "away."
        )
    found = {name: given.value for name, given in folder.settings().items()}
    for name, ours in settings.values().items():
        if name in ("device", "sae.device", "llm_device", "act_store_device", "wandb_id", "run_name"):
            continue
        ours = list(ours) if isinstance(ours, tuple) else ours
        if name in found and found[name] != ours:
            raise ValueError(
                f"{folder.path} holds a run with other settings ({name}: {found[name]!r} there, {ours!r} "
                "here). Choose another --name, or move that folder away."
            )


def _recorded_wandb_id(folders: Mapping[str, RunFolder], finished: set[str]) -> str | None:
    """The id under which W&B knows the runs that are now gone on with."""
    for name, folder in folders.items():
        if name not in finished and folder.config.is_file() and (wandb := folder.read().get("wandb")):
            return wandb["id"]
    return None


def _is_finished(folder: RunFolder) -> bool:
    return folder.config.is_file() and bool(folder.read().get("completed_at"))


def _remove_if_unused(parent: Path) -> None:
    if all(path.name == LOCK for path in parent.iterdir()):
        (parent / LOCK).unlink(missing_ok=True)
        parent.rmdir()
