"""A run: SAELens's runner, in a run folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, SAETrainer
from typing_extensions import override

from saelens_matryoshka.atomic import write_atomically
from saelens_matryoshka.cache import CachedModel, open_cache
from saelens_matryoshka.cache.store import is_cache
from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.runner import Observer, held_out_evaluator, observe
from saelens_matryoshka.runs.folder import RunFolder, now, versions
from saelens_matryoshka.runs.mappings import TINY
from saelens_matryoshka.runs.metrics_log import MetricsLog
from saelens_matryoshka.runs.settings import TINY_TEXT, Settings


class RunRunner(LanguageModelSAETrainingRunner):
    """The stock runner, whose trainer is observed.

    Observers (see `saelens_matryoshka.runner.observe`) are called after every complete step, in their order:
    the metrics log hangs there, and whatever else follows a run.
    """

    observers: list[Observer]

    def __init__(self, *args: Any, observers: list[Observer] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observers = list(observers or [])

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        for observer in self.observers:
            observe(trainer, observer)
        return super().run_trainer_with_interruption_handling(trainer)


def train_run(
    settings: Settings, folder: RunFolder, *, log_every: int = 20, command: Sequence[str] = ()
) -> EvalResult | None:
    """Train in a folder, from the first step to the evaluation of what was saved.

    1. Everything is loaded and checked; nothing is written before that has gone well.
    2. The folder is made, with config.yaml.
    3. The runner trains and saves the stock SAE in the folder.
    4. Every prefix is evaluated on the held-out prompts; config.yaml gets `completed_at`.

    Args:
        settings: As `resolve` gives them.
        folder: Which does not exist, or is empty.
        log_every: Steps between two lines of metrics.jsonl.
        command: What was called, for the record.

    Returns:
        The evaluation; None where the dataset was too small to hold prompts out.

    Raises:
        ValueError: the folder is used, or the settings do not fit the model or the data.
    """
    folder.require_unused()
    cfg = settings.cfg
    cfg.output_path, cfg.checkpoint_path = str(folder.path), str(folder.checkpoints)
    cfg.logger.wandb_id = cfg.logger.wandb_id or uuid.uuid4().hex[:8]
    if "run_name" not in settings.given:
        cfg.logger.run_name = folder.path.name
    observers: list[Observer] = [MetricsLog(folder.metrics_log, log_every)]

    torch.manual_seed(cfg.seed)  # the runner itself does not
    runner = RunRunner(cfg, observers=observers, **overrides(settings))

    folder.path.mkdir(parents=True, exist_ok=True)
    folder.require_unused()
    folder.write_config(
        settings,
        command=list(command),
        versions=versions(),
        wandb={"id": cfg.logger.wandb_id} if cfg.logger.log_to_wandb else None,
        started_at=now(),
    )
    with wandb_in(folder):
        runner.run()
    result = evaluate_run(runner, folder)
    folder.add_record("completed_at", now())
    return result


def evaluate_run(runner: LanguageModelSAETrainingRunner, folder: RunFolder) -> EvalResult | None:
    """Evaluate the saved SAE of a run on the prompts that were held out of its training, as metrics.json."""
    evaluator = held_out_evaluator(runner.evaluator)
    if evaluator is None:
        return None
    result = evaluator.result(SAE.load_from_disk(folder.path, device=runner.cfg.device))
    if result is None:
        return None
    write_atomically(folder.metrics, result.to_json() + "\n")
    return result


def overrides(settings: Settings) -> dict[str, Any]:
    """What the runner is given where SAELens cannot load it by name: the embedded model and its text.

    And the stand-in for the model of a cache.
    """
    cfg = settings.cfg
    if cfg.use_cached_activations and is_cache(cfg.cached_activations_path):
        assert cfg.cached_activations_path is not None
        return {"override_model": CachedModel(open_cache(cfg.cached_activations_path))}
    if settings.cfg.model_name not in TINY:
        return {}
    from saelens_matryoshka import tiny

    found: dict[str, Any] = {"override_model": tiny.load_hooked_transformer().to(settings.cfg.llm_device)}
    if settings.cfg.dataset_path == TINY_TEXT:
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
