"""A run: SAELens's runner, in a run folder."""

from __future__ import annotations

import dataclasses
import os
import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, SAETrainer
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from typing_extensions import override

from saelens_matryoshka import parallel, tiny
from saelens_matryoshka.cache import CachedModel, open_cache
from saelens_matryoshka.cache.store import is_cache
from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.files.text import TextError, is_saved_dataset, is_text_file, open_text
from saelens_matryoshka.runner import Observer, held_out_evaluator, observe
from saelens_matryoshka.runs.folder import RunFolder, now
from saelens_matryoshka.runs.lock import locked
from saelens_matryoshka.runs.metrics_log import MetricsLog
from saelens_matryoshka.runs.settings import TINY_TEXT, Settings, resolve
from saelens_matryoshka.upkeep.checkpoints import Checkpoints, warn_of_other_versions
from saelens_matryoshka.upkeep.keeper import Keeper, Upkeep, after_training
from saelens_matryoshka.upkeep.wandb_guard import wandb_cannot_stop_it
from saelens_matryoshka.versions import package_versions

_FINAL_FILES = (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME, RUNNER_CFG_FILENAME, SPARSITY_FILENAME)


class RunRunner(LanguageModelSAETrainingRunner):
    """The stock runner, whose trainer is observed and whose state is kept.

    Observers (see `saelens_matryoshka.runner.observe`) are called after every complete step, in their order:
    the metrics log hangs there, and whatever else follows a run. The keeper comes last, so that a checkpoint
    is not ahead of the log. It also takes the place of the stock runner's handling of interruptions, which
    ends a step in its middle and then saves no weights.
    """

    def __init__(self, *args: Any, observers: Sequence[Observer], keeper: Keeper, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observers, self.keeper = observers, keeper

    @override
    def run(self) -> Any:
        with wandb_cannot_stop_it("finish"):
            return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.cfg.resume_from_checkpoint = None  # done, and no setting of the run
        for observer in self.observers:
            observe(trainer, observer)
        observe(trainer, self.keeper)
        with wandb_cannot_stop_it():
            return self.keeper.train(trainer, trainer.fit)

    @override
    def save_final_sae(self, *args: Any, **kwargs: Any) -> None:
        with wandb_cannot_stop_it(), after_training():
            super().save_final_sae(*args, **kwargs)


def train_run(
    settings: Settings,
    folder: RunFolder,
    *,
    log_every: int = 20,
    upkeep: Upkeep | None = None,
    command: Sequence[str] = (),
    sharding: parallel.Sharding | None = None,
    shards: int | None = None,
) -> EvalResult | None:
    """Train in a folder, from the first step to the evaluation of what was saved.

    Under torchrun, together with its other processes, of which the first writes and evaluates.

    1. Everything is loaded and checked; nothing is written before that has gone well.
    2. The folder is made and locked, with config.yaml.
    3. The runner trains and saves the stock SAE in the folder.
    4. Every prefix is evaluated on the held-out prompts; config.yaml gets `completed_at`.

    Args:
        settings: As `resolve` gives them.
        folder: Which does not exist, or is empty.
        log_every: Steps between two lines of metrics.jsonl.
        upkeep: How its state is kept.
        command: What was called, for the record.
        sharding: "dictionary" divides the latents among torchrun's processes; None, only the rows.
        shards: Among how many of them; None, all.

    Returns:
        The evaluation; None where the dataset was too small to hold prompts out, and in all processes but the
        first.

    Raises:
        ValueError: the folder is used, or the settings do not fit the model or the data.
        RunStopped: a signal or an error has ended it; `resume_run` goes on.
    """
    upkeep = upkeep or Upkeep()
    settings.cfg.logger.wandb_id = settings.cfg.logger.wandb_id or uuid.uuid4().hex[:8]
    with parallel.joined(settings.cfg, sharding, shards) as job, ExitStack() as held:
        if job.is_first:
            folder.require_unused()
        runner = _runner(settings, folder, log_every, upkeep, job)
        if job.is_first:
            folder.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder.path))
            folder.require_unused()
            folder.write_config(
                settings,
                command=list(command),
                versions=package_versions(),
                wandb={"id": settings.cfg.logger.wandb_id} if settings.cfg.logger.log_to_wandb else None,
                upkeep=upkeep_record(log_every, upkeep),
                started_at=now(),
            )
        return _run(runner, folder, job)


def resume_run(
    folder: RunFolder,
    sharding: parallel.Sharding | None = None,
    shards: int | None = None,
    *,
    on_start: Callable[[int], None] = lambda _: None,
    **upkeep: Any,
) -> EvalResult | None:
    """Go on with a run that was stopped, from its newest whole checkpoint to its end.

    On the same machine and with the same packages its weights, metrics.jsonl (but for times) and metrics.json
    become those it would have had.

    Args:
        folder: Of the run.
        sharding: As `train_run`; it need not be what the run was started with, nor the number of processes.
        shards: As `train_run`, likewise.
        on_start: Called by the first process with the step that the run goes on after, once it is known that
            it can.
        **upkeep: What is to be other than at its start: fields of `Upkeep`.

    Raises:
        ValueError: it is finished, in use, trained in lockstep with others, or not a run; or its settings no
            longer work.
        RunStopped: as `train_run`.
    """
    recorded = folder.read()
    if recorded.get("lockstep"):
        parent = shlex.quote(str(folder.path.parent))
        raise ValueError(
            f"{folder.path} is trained in lockstep with others, and their checkpoints are of all together. "
            f"To go on: saelens-matryoshka train --resume {parent}"
        )
    _require_unfinished(folder)
    log_every, kept = recorded_upkeep(recorded, upkeep)
    settings = resolve([folder.settings()])
    if recorded.get("wandb"):
        settings.cfg.logger.wandb_id = recorded["wandb"]["id"]
    with parallel.joined(settings.cfg, sharding, shards) as job, ExitStack() as held:
        checkpoints = Checkpoints(folder.checkpoints)
        if job.is_first:
            held.enter_context(locked(folder.path))
            _require_unfinished(folder)  # another process may have held it until now
            checkpoints.clean()
            remove_final_files(folder)
        checkpoint = checkpoints.newest()
        if checkpoint is not None:
            warn_of_other_versions(checkpoint)
            settings.cfg.resume_from_checkpoint = str(checkpoint.path)
        if job.is_first:
            on_start(0 if checkpoint is None else checkpoint.n_steps)
        return _run(_runner(settings, folder, log_every, kept, job), folder, job)


def remove_final_files(folder: RunFolder) -> None:
    """Of a run that was ended while it saved them, or after that: they are saved again."""
    for name in _FINAL_FILES:
        (folder.path / name).unlink(missing_ok=True)


def _require_unfinished(folder: RunFolder) -> None:
    if folder.read().get("completed_at"):
        raise ValueError(f"{folder.path} holds a finished run: there is nothing to go on with.")


def upkeep_record(log_every: int, upkeep: Upkeep) -> dict[str, Any]:
    """How a run is kept, for its config.yaml: see `recorded_upkeep`."""
    return {"log_every": log_every, **dataclasses.asdict(upkeep)}


def recorded_upkeep(recorded: Mapping[str, Any], changed: Mapping[str, Any]) -> tuple[int, Upkeep]:
    """Steps between two lines of the log, and how a run is kept, as its config.yaml says.

    Args:
        recorded: The contents of config.yaml.
        changed: Fields of `Upkeep` that are to be other than recorded.

    Raises:
        ValueError: config.yaml says something else.
    """
    kept, known = recorded.get("upkeep") or {}, upkeep_record(20, Upkeep())
    is_known = isinstance(kept, dict) and kept.keys() <= known.keys()
    if not is_known or not isinstance(kept.get("log_every", 20), int):
        raise ValueError(
            f"upkeep={kept!r} in the run's config.yaml must be a mapping of {', '.join(known)} to numbers."
        )
    kept = known | kept | dict(changed)
    return kept.pop("log_every"), Upkeep(**kept)


def _runner(
    settings: Settings, folder: RunFolder, log_every: int, upkeep: Upkeep, job: parallel.Job
) -> RunRunner:
    cfg = settings.cfg
    cfg.output_path, cfg.checkpoint_path = str(folder.path), str(folder.checkpoints)
    if "run_name" not in settings.given:
        cfg.logger.run_name = folder.path.name
    checkpoints = Checkpoints(folder.checkpoints, upkeep.keep, logs=[folder.metrics_log])
    keeper = Keeper(checkpoints, minutes=upkeep.checkpoint_minutes)
    observers: list[Observer] = [MetricsLog(folder.metrics_log, log_every)] if job.is_first else []
    torch.manual_seed(cfg.seed)  # the runner itself does not
    replaced = overrides(settings) | job.overrides(cfg)
    runner = RunRunner(cfg, observers=observers, keeper=keeper, **replaced)
    runner.sae.finite.may_skip = upkeep.skip_bad_batches  # type: ignore[union-attr]  (one of ours)
    job.share(runner, keeper)
    store: Any = runner.activations_store  # one of ours
    store.require_buffer()  # here, where the batch is what this process serves of it
    return runner


def _run(runner: RunRunner, folder: RunFolder, job: parallel.Job) -> EvalResult | None:
    with wandb_in(folder):
        runner.run()
    if not job.is_first:
        return None
    with after_training():
        result = evaluate_run(runner, folder)
        folder.add_record("completed_at", now())
    return result


def evaluate_run(runner: LanguageModelSAETrainingRunner, folder: RunFolder) -> EvalResult | None:
    """Evaluate the saved SAE of a run on the prompts that were held out of its training, as metrics.json."""
    evaluator = held_out_evaluator(runner.evaluator)
    if evaluator is None:
        return None
    result = evaluator.result(SAE.load_from_disk(folder.path, device=runner.cfg.device))
    write_atomically(folder.metrics, result.to_json() + "\n")
    return result


def overrides(settings: Settings) -> dict[str, Any]:
    """The embedded model and its text, and text files and saved datasets, which SAELens cannot load by name.

    Of a run on a cache, the stand-in for the language model.
    """
    cfg, found = settings.cfg, {}
    if cfg.use_cached_activations and is_cache(cfg.cached_activations_path):
        assert cfg.cached_activations_path is not None
        return {"override_model": CachedModel(open_cache(cfg.cached_activations_path))}
    if is_text_file(cfg.dataset_path) or is_saved_dataset(cfg.dataset_path):
        try:
            found["override_dataset"] = open_text(cfg.dataset_path, streaming=cfg.streaming)
        except TextError as error:
            raise ValueError(f"--dataset_path {error}") from None
    if cfg.model_name not in tiny.NAMES:
        return found
    device = cfg.llm_device or cfg.device
    found["override_model"] = tiny.load_hooked_transformer().to(device, print_details=False)
    if cfg.dataset_path == TINY_TEXT:
        found["override_dataset"] = tiny.text.dataset("train")
    return found


@contextmanager
def wandb_in(folder: RunFolder) -> Iterator[None]:
    """Have W&B keep its files in the folder, and continue a run of the same id."""
    ours = {"WANDB_DIR": str(folder.path), "WANDB_RESUME": "allow"}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
