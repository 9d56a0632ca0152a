"""Train several dictionaries in lockstep on SAELens's `MultiSAETrainer`.

Each is trained as it would be alone: by a trainer of its own, with its own optimizer, schedule, scaling,
threshold and dead-latent counts, from its own runner config, into its own folder. What they share is the
language model, which runs once per batch, the text, the buffer and the order of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, SAETrainer, TrainingSAE
from sae_lens.config import HfDataset
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.load_model import load_model
from sae_lens.saes.sae import TrainingSAEConfig, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm
from typing_extensions import override

from saelens_matryoshka.architectures import MatryoshkaTrainingTranscoderConfig
from saelens_matryoshka.cache.manifest import RUNNER_FIELDS
from saelens_matryoshka.cache.reader import open_cache
from saelens_matryoshka.cache.store import CachedModel, cached_store, is_cache
from saelens_matryoshka.evaluation.tokens import as_dataset
from saelens_matryoshka.evaluation.training_evaluator import hold_out_prompts, share_held_out
from saelens_matryoshka.layers.scaling import estimate_scaling_factors
from saelens_matryoshka.layers.store import (
    OwnBatches,
    PartOfStore,
    SharedBatches,
    many_hook_store,
)
from saelens_matryoshka.ops import SparseStep
from saelens_matryoshka.progress import ProgressBar
from saelens_matryoshka.random_state import random_state, set_random_state
from saelens_matryoshka.runner import (
    Observer,
    check_pretrained,
    check_source,
    complete_step,
    observe,
    prepare_trainer,
    require_own_output_path,
    require_sizes,
)
from saelens_matryoshka.seams import defer_checkpoints, replace_progress_bar, set_sae_metadata
from saelens_matryoshka.store.pairs import probe_hooks, require_enough_text
from saelens_matryoshka.store.reading import Reading, hooks_of
from saelens_matryoshka.upkeep.keeper import Keeper, after_training
from saelens_matryoshka.upkeep.wandb_guard import wandb_cannot_stop_it

# Fields of the runner config that say how the shared rows are made and served.
_SHARED = (
    *RUNNER_FIELDS,
    "streaming",
    "store_batch_size_prompts",
    "n_batches_in_buffer",
    "activations_mixing_fraction",
    "train_batch_size_tokens",
    "training_tokens",
    "n_batches_for_norm_estimate",
    "n_eval_batches",
    "eval_batch_size_prompts",
    "n_checkpoints",
    "dtype",
    "device",
    "llm_device",
    "act_store_device",
    "prefetch_llm_batches",
    "compile_llm",
    "llm_compilation_mode",
    "use_cached_activations",
    "cached_activations_path",
)


def train_layers(
    cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]],
    *,
    override_model: Any = None,
    override_dataset: HfDataset | None = None,
    observers: Mapping[str, Sequence[Observer]] | None = None,
    keeper: Keeper | None = None,
    may_skip: int = 0,
    resume_from: Path | None = None,
    finished: Callable[[str], bool] | None = None,
    on_start: Callable[[], None] | None = None,
) -> dict[str, PartRunner]:
    """Train the dictionaries of several runner configs in lockstep, and save each in its `output_path`.

    Those that are in their `output_path` already are left out.

    Args:
        cfgs: By name. They may differ in everything but the language model, the text, the buffer, the batch
            and the devices.
        override_model: Used in place of `model_name`.
        override_dataset: Used in place of `dataset_path`.
        observers: By name, called after every step (see `saelens_matryoshka.runner.observe`).
        keeper: Writes checkpoints of all together.
        may_skip: Batches of NaN or Inf that each may leave out.
        resume_from: A checkpoint of a keeper to go on from.
        finished: Whether one is to be left out. Default: its `output_path` holds a saved model.
        on_start: Called when everything has been loaded and checked, before the first step.

    Returns:
        A runner of each that was trained: `sae`, `cfg` and `evaluator`.

    Raises:
        ValueError: the configs do not go together, or one does not fit the model or the text; the message
            names it. Raised before anything is written.
    """
    require_common(cfgs)
    for name, cfg in cfgs.items():
        with _naming(name):
            require_sizes(cfg)
            check_pretrained(cfg)
            require_own_output_path(cfg)
    cfgs = _unfinished(cfgs, finished)
    if not cfgs:
        return {}
    runners, batches = _opened(cfgs, override_model, override_dataset)
    with closing(batches), _wandb_run(cfgs):
        if on_start is not None:
            on_start()
        trainer = LockstepTrainer(runners, batches)
        for name, one in trainer.trainers.items():
            one.sae.finite.may_skip = may_skip
            for observer in (observers or {}).get(name, ()):
                observe(one, observer)
        with wandb_cannot_stop_it():
            _fit(trainer, keeper, resume_from)
            with nullcontext() if keeper is None else after_training():
                _save(trainer, runners)
    return runners


def _unfinished(
    cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]], finished: Callable[[str], bool] | None
) -> dict[str, LanguageModelSAERunnerConfig[Any]]:
    """Those that are left to train."""
    is_finished = finished or (lambda name: _is_saved(cfgs[name]))
    return {name: cfg for name, cfg in cfgs.items() if not is_finished(name)}


@contextmanager
def _wandb_run(cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]]) -> Iterator[None]:
    """Within, the run of all together in W&B, if it logs there."""
    logger = next(iter(cfgs.values())).logger
    if not logger.log_to_wandb:
        yield
        return
    wandb.init(
        project=logger.wandb_project,
        entity=logger.wandb_entity,
        config={name: cfg.to_dict() for name, cfg in cfgs.items()},
        name=logger.run_name,
        id=logger.wandb_id,
    )
    try:
        yield
    finally:
        with wandb_cannot_stop_it("finish"):
            wandb.finish()


def _fit(trainer: LockstepTrainer, keeper: Keeper | None, resume_from: Path | None) -> None:
    """Train to the end, from the start or a checkpoint."""
    if resume_from is not None:
        trainer.load_checkpoint(resume_from)
    if keeper is None:
        trainer.fit()
    else:
        trainer.observers.append(keeper)  # type: ignore[arg-type]
        keeper.train(trainer, trainer.fit)  # type: ignore[arg-type]


def _save(trainer: LockstepTrainer, runners: Mapping[str, PartRunner]) -> None:
    """Save each in its `output_path`, if it has one."""
    for name, runner in runners.items():
        if runner.cfg.output_path is not None:
            sparsity = trainer.trainers[name].log_feature_sparsity
            runner.save_final_sae(runner.sae, runner.cfg.output_path, sparsity)


class PartRunner(LanguageModelSAETrainingRunner):
    """The runner of one of several dictionaries that share a language model: all but the running."""

    def __init__(  # pyright: ignore[reportMissingSuperCall]
        self, cfg: LanguageModelSAERunnerConfig[Any], model: Any, store: Any
    ) -> None:
        self.cfg, self.model, self.activations_store = cfg, model, store
        if cfg.from_pretrained_path is not None:
            self.sae = TrainingSAE.load_from_disk(cfg.from_pretrained_path, cfg.device)
        else:
            settings = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
            self.sae = TrainingSAE.from_dict(settings.to_dict())
        self.sae.to(cfg.device)
        self.evaluator = LLMSaeEvaluator(
            model=model,
            activations_store=store,
            eval_batch_size_prompts=cfg.eval_batch_size_prompts,
            n_eval_batches=cfg.n_eval_batches,
            model_kwargs=cfg.model_kwargs,
        )
        set_sae_metadata(self)


class LockstepTrainer(MultiSAETrainer):
    """SAELens's `MultiSAETrainer`, whose trainers are prepared as they are when each trains alone."""

    def __init__(self, runners: Mapping[str, PartRunner], batches: Any) -> None:
        configs = {name: runner.cfg.to_sae_trainer_config() for name, runner in runners.items()}
        saes = {name: runner.sae for name, runner in runners.items()}
        super().__init__(
            cfg=next(iter(configs.values())),
            saes=saes,
            hook_names={name: name for name in runners},  # its batches come by name
            data_provider=batches,
            evaluator=self._evaluate,
            save_checkpoint_fn=batches.save_to_checkpoint,
        )
        _share_memory(list(saes.values()))
        self.observers: list[Callable[[LockstepTrainer, Any], None]] = []
        self._is_prepared = False
        for name, runner in runners.items():
            self.trainers[name] = SAETrainer(
                cfg=dataclasses.replace(
                    configs[name], n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False
                ),
                sae=runner.sae,
                data_provider=iter(()),
                evaluator=runner.evaluator,
            )

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        for trainer in self.trainers.values():
            prepare_trainer(trainer)
        estimate_scaling_factors(self)
        if not self._is_prepared:  # a run that was interrupted may call `fit` again
            save_if_due = defer_checkpoints(self)  # type: ignore[arg-type]
            replace_progress_bar(self, partial(self._after_step, save_if_due, ProgressBar(self)))  # type: ignore[arg-type]
            self._is_prepared = True
        return super().fit()

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        super().load_checkpoint(path)
        self.data_provider.load_from_checkpoint(path)  # type: ignore[attr-defined]

    def _after_step(
        self,
        save_if_due: Callable[[], None],
        bar: ProgressBar,
        step_outputs: dict[str, TrainStepOutput],
        pbar: tqdm,  # type: ignore[type-arg]
        update_interval: int = 100,  # noqa: ARG002  (the stock signature)
    ) -> None:
        bar.update(pbar, partial(self._shown, step_outputs))
        for name, trainer in self.trainers.items():
            complete_step(trainer, step_outputs[name])
        for observer in self.observers:
            observer(self, step_outputs)
        save_if_due()

    def _shown(self, step_outputs: dict[str, TrainStepOutput]) -> str:
        """The FVU and dead latents of the best and the worst."""
        fvus = torch.stack([output.metrics["fvu"]() for output in step_outputs.values()])  # type: ignore
        dead = torch.stack([trainer.dead_neurons.float().mean() for trainer in self.trainers.values()])
        return (
            f"FVU {fvus.min().item():.3f}–{fvus.max().item():.3f} "
            f"dead {dead.min().item():.0%}–{dead.max().item():.0%}"
        )

    def _evaluate(
        self, saes: Any, data_provider: Any, activation_scalers: Any, hook_names: Any
    ) -> dict[str, Any]:
        del hook_names
        return {
            f"{name}/{key}": value
            for name, trainer in self.trainers.items()
            if trainer.evaluator is not None
            for key, value in trainer.evaluator(saes[name], data_provider, activation_scalers[name]).items()
        }


def _share_memory(saes: Sequence[Any]) -> None:
    """Have dictionaries of the same sizes, which step one after the other, use the same buffers."""
    first: dict[Any, SparseStep] = {}
    for sae in saes:
        if isinstance(sae.step_fn, SparseStep):
            sizes = (sae.W_enc.shape, sae.W_dec.shape, sae.dtype)
            sae.step_fn.share_memory(first.setdefault(sizes, sae.step_fn))


# ---- what they read


def _opened(
    cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]],
    override_model: Any,
    override_dataset: HfDataset | None,
) -> tuple[dict[str, PartRunner], Any]:
    """A runner of each, and the batches of all."""
    if next(iter(cfgs.values())).use_cached_activations:
        return _from_cache(cfgs)
    model = load_model_for(list(cfgs.values())) if override_model is None else override_model
    return _from_model(cfgs, model, override_dataset)


def _from_model(
    cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]], model: Any, override_dataset: HfDataset | None
) -> tuple[dict[str, PartRunner], Any]:
    first = next(iter(cfgs.values()))
    if override_dataset is not None:
        override_dataset = as_dataset(override_dataset, "override_dataset")
    readings: dict[str, Reading] = {}
    widths: dict[str, int] = {}
    for name, cfg in cfgs.items():
        with _naming(name):
            readings[name] = _reading(model, cfg)
            for hook in readings[name].hooks:
                widths.setdefault(hook, _width(model, hook))
    try:
        store = many_hook_store(model, first, widths, override_dataset)
    except StopIteration:
        raise ValueError(f"dataset_path={first.dataset_path!r}: the dataset is empty.") from None
    store.require_buffer()
    require_enough_text(store, first)
    hold_out_prompts(store, first)
    parts = {name: PartOfStore(store, reading) for name, reading in readings.items()}
    for part in parts.values():
        share_held_out(store, part)
    runners = _runners(cfgs, model, parts)
    return runners, SharedBatches(store, readings, int(first.prefetch_llm_batches))


def _from_cache(cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]]) -> tuple[dict[str, PartRunner], Any]:
    first = next(iter(cfgs.values()))
    if not is_cache(first.cached_activations_path):
        raise ValueError(
            f"cached_activations_path={first.cached_activations_path!r} is not a cache of "
            "saelens-matryoshka. SAELens's own caches hold one hook."
        )
    assert first.cached_activations_path is not None
    model = CachedModel(open_cache(first.cached_activations_path))
    stores = {}
    for name, cfg in cfgs.items():
        with _naming(name):
            stores[name] = cached_store(cfg, model)
    return _runners(cfgs, model, stores), OwnBatches(stores)


def _runners(
    cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]], model: Any, stores: Mapping[str, Any]
) -> dict[str, PartRunner]:
    """A runner of each, whose SAE starts from the random state from which it would start alone."""
    first = next(iter(cfgs.values()))
    torch.empty(0, device=first.device)  # a GPU's random state is known once it has been used
    at_start = after_first = random_state()
    runners: dict[str, PartRunner] = {}
    for name, cfg in cfgs.items():
        if cfg.seed == first.seed:
            set_random_state(*at_start)
        else:
            torch.manual_seed(cfg.seed)
        with _naming(name):
            runners[name] = PartRunner(cfg, model, stores[name])
        if len(runners) == 1:
            after_first = random_state()
    set_random_state(*after_first)
    return runners


def _reading(model: Any, cfg: LanguageModelSAERunnerConfig[Any]) -> Reading:
    source = check_source(model, cfg)
    head = cfg.hook_head_index
    columns = None if head is None else slice(head * cfg.sae.d_in, (head + 1) * cfg.sae.d_in)
    is_transcoder = isinstance(cfg.sae, MatryoshkaTrainingTranscoderConfig)
    return Reading(source, cfg.sae.hook_name_out if is_transcoder else None, columns)


def _width(model: Any, hook: str) -> int:
    return probe_hooks(model, hook, hook).d_in


def load_model_for(cfgs: Sequence[LanguageModelSAERunnerConfig[Any]]) -> Any:
    """The language model of several configs, with all their hooks."""
    cfg = cfgs[0]
    assert cfg.llm_device is not None  # set in the config's __post_init__
    model: Any = load_model(
        cfg.model_class_name,
        cfg.model_name,
        device=cfg.llm_device,
        model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
        hook_names=hooks_of(cfgs),
    )
    if cfg.compile_llm:
        model.run_with_cache = torch.compile(model.run_with_cache, mode=cfg.llm_compilation_mode)
    return model


# ---- checks


def require_common(cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]]) -> None:
    """Refuse configs, by name, that cannot be trained in lockstep.

    Raises:
        ValueError: what they must share differs; the message names the field.
    """
    if not cfgs:
        raise ValueError("There is nothing to train: no config is given.")
    if not isinstance(cfgs, Mapping):
        raise ValueError(f"cfgs is a {type(cfgs).__name__}, and must be a dict of configs by their names.")
    first_name, first = next(iter(cfgs.items()))
    folders: dict[str, str] = {}
    for name, cfg in cfgs.items():
        if not isinstance(cfg, LanguageModelSAERunnerConfig):
            raise ValueError(
                f"{name!r} is a {type(cfg).__name__}, and must be a LanguageModelSAERunnerConfig, whose sae "
                "says what to train."
            )
        if "/" in name or not name:
            raise ValueError(f"{name!r} is no name for a dictionary: it names a folder of the checkpoints.")
        for field in _SHARED:
            ours, theirs = getattr(cfg, field), getattr(first, field)
            if ours != theirs:
                raise ValueError(
                    f"{field}: dictionaries that are trained in lockstep share it, and {first_name!r} has "
                    f"{theirs!r} and {name!r} {ours!r}."
                )
        if cfg.compile_sae:
            raise ValueError(f"{name}: compile_sae=True is not possible in lockstep. Set it to False.")
        if cfg.output_path is not None:
            folder = str(Path(cfg.output_path).resolve())
            if folder in folders:
                raise ValueError(f"output_path: {folders[folder]!r} and {name!r} have the same, {folder}.")
            folders[folder] = name


def _is_saved(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    """Whether a config's result is in its folder. (That it is of the same settings was checked before.)"""
    names = (RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    return cfg.output_path is not None and all((Path(cfg.output_path) / name).is_file() for name in names)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Within, a ValueError says which dictionary it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
