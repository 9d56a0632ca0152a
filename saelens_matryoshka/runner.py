"""What happens inside SAELens's runner for our architectures: the checks, the paired store, the trainer.

The runner loads the model, builds the store, builds the SAE, and trains. `build_store` is called at the
second of these steps, `prepare_trainer` right before the last.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sae_lens import LanguageModelSAERunnerConfig, SAETrainer
from sae_lens.config import HfDataset
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.prefetch import PrefetchingIterator
from tqdm.auto import tqdm

from saelens_matryoshka.adam import fuse_adam, hand_back_gradients
from saelens_matryoshka.architectures import (
    MatryoshkaTrainingTranscoder,
    MatryoshkaTrainingTranscoderConfig,
)
from saelens_matryoshka.architectures.config import require_float64, require_positive_int
from saelens_matryoshka.cache.store import CachedActivationsStore, cached_store, evaluate_cached, is_cache
from saelens_matryoshka.evaluation.tokens import as_dataset, require_context_size
from saelens_matryoshka.evaluation.training_evaluator import (
    CachedEvaluator,
    HeldOutEvaluator,
    hold_out_prompts,
)
from saelens_matryoshka.files.atomic import obstacle
from saelens_matryoshka.ops import SparseStep
from saelens_matryoshka.progress import ProgressBar, summary
from saelens_matryoshka.scaling import FiniteScaler
from saelens_matryoshka.seams import defer_checkpoints, replace_progress_bar
from saelens_matryoshka.sites import Site, check_hook, make_readable, norm_frame, norm_gain
from saelens_matryoshka.store.pairs import (
    paired_store,
    probe_hooks,
    require_enough_text,
    warn_of_same_tensor,
)
from saelens_matryoshka.store.reading import Reading
from saelens_matryoshka.store.resumable import PrefetchedBatches, ResumableStore

# Entries of a runner config that differ between two starts of the same run.
_VOLATILE = frozenset(
    {
        "checkpoint_path",
        "resume_from_checkpoint",
        "logger",
        "sae_lens_version",
        "sae_lens_training_version",
        "device",
        "llm_device",
        "act_store_device",
        "verbose",
        "output_path",
        "tokens_per_buffer",
        "metadata",
    }
)

T = TypeVar("T", bound=ResumableStore)
Observer = Callable[[SAETrainer[Any, Any], TrainStepOutput], None]


# ---- the store


def build_store(
    model: Any,
    cfg: LanguageModelSAERunnerConfig[Any],
    override_dataset: HfDataset | None,
    *,
    stock_from_config: Callable[..., ResumableStore],
) -> ResumableStore:
    """The activation store of one of our runner configs, after checking that it can work.

    Args:
        model: The language model.
        cfg: Runner config whose `sae` is ours.
        override_dataset: Used in place of `cfg.dataset_path`; None, that.
        stock_from_config: SAELens's own way to build a store of one hook.

    Raises:
        ValueError: the config does not fit the model, the dataset or the output folder; the message names
            the field. Raised before the dataset is opened where possible, and before anything is written.
    """
    require_float64("device", cfg.device)
    require_sizes(cfg)
    check_pretrained(cfg)
    require_own_output_path(cfg)
    if cfg.use_cached_activations and is_cache(cfg.cached_activations_path):
        return _expecting_prefetching(cached_store(cfg, model), cfg)
    source = check_source(model, cfg)
    store: ResumableStore
    try:
        if override_dataset is not None:
            override_dataset = as_dataset(override_dataset, "override_dataset")
        if isinstance(override_dataset, Sized) and len(override_dataset) == 0:
            raise StopIteration  # SAELens would read dataset_path in its place
        if isinstance(cfg.sae, MatryoshkaTrainingTranscoderConfig):
            store = paired_store(model, cfg, source, override_dataset)
        else:
            store = stock_from_config(model, cfg, override_dataset)
    except StopIteration:
        raise ValueError(f"dataset_path={cfg.dataset_path!r}: the dataset is empty.") from None
    require_enough_text(store, cfg)
    hold_out_prompts(store, cfg)
    return _expecting_prefetching(store, cfg)


def _expecting_prefetching(store: T, cfg: LanguageModelSAERunnerConfig[Any]) -> T:
    if cfg.prefetch_llm_batches:
        store.expect_prefetching(int(cfg.prefetch_llm_batches))
    return store


def check_source(model: Any, cfg: LanguageModelSAERunnerConfig[Any]) -> Site:
    """Check a config's prompts, hooks and widths on its model; return the source, with any gain.

    Raises:
        ValueError: the prompts are too long for the model, a hook does not exist or is not as wide as the
            config says, or the target comes first.
    """
    require_context_size(cfg.context_size, model)
    check_hook(model, cfg.hook_name, "hook_name")
    make_readable(model, cfg.hook_name)
    is_transcoder = isinstance(cfg.sae, MatryoshkaTrainingTranscoderConfig)
    return _check_transcoder(model, cfg) if is_transcoder else _check_sae(model, cfg)


def _check_sae(model: Any, cfg: LanguageModelSAERunnerConfig[Any]) -> Site:
    probe = probe_hooks(model, cfg.hook_name, cfg.hook_name, cfg.hook_head_index)
    _require_width("d_in", cfg.sae.d_in, cfg.hook_name, probe.d_in)
    return Site(cfg.hook_name)


def _check_transcoder(model: Any, cfg: LanguageModelSAERunnerConfig[Any]) -> Site:
    """Check hooks, their order and widths; return the source with its gain."""
    sae: MatryoshkaTrainingTranscoderConfig = cfg.sae
    check_hook(model, sae.hook_name_out, "hook_name_out")
    make_readable(model, sae.hook_name_out)
    site = Site(cfg.hook_name)
    if sae.input_gain == "norm_weight":
        site = Site(cfg.hook_name, *norm_gain(model, cfg.hook_name))
    probe = probe_hooks(model, cfg.hook_name, sae.hook_name_out, cfg.hook_head_index)
    _require_width("d_in", sae.d_in, cfg.hook_name, probe.d_in)
    _require_width("d_out", sae.d_out, sae.hook_name_out, probe.d_out)
    if probe.target_is_first:
        raise ValueError(
            f"hook_name_out={sae.hook_name_out!r} is computed before hook_name={cfg.hook_name!r}: a "
            "transcoder predicts the target from the source. Swap them, or choose a later target."
        )
    if probe.same_tensor:
        warn_of_same_tensor(cfg.hook_name, sae.hook_name_out)
    return site


def _require_width(field: str, configured: int | None, hook: str, actual: int) -> None:
    if configured != actual:
        raise ValueError(
            f"{field}={configured}, but hook {hook!r} of this model gives {actual} values per token. "
            f"Set {field}={actual}."
        )


def require_sizes(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse a run of no tokens, which would end with the weights it starts from, or of endless ones, and
    batches that are not of a whole number of rows."""
    tokens: Any = cfg.training_tokens  # 1e6 will do
    if not isinstance(tokens, int | float) or not 0 < tokens < math.inf:
        raise ValueError(f"training_tokens={tokens!r} must be a number larger than 0.")
    for name in ("train_batch_size_tokens", "store_batch_size_prompts"):
        require_positive_int(name, getattr(cfg, name))


def require_pretrained(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any] | None:
    """Refuse a from_pretrained_path of another architecture; return the settings of the dictionary there.

    SAELens would train whatever it loads. What a run saves at its end is of another architecture: a stock
    model, which has no nested levels to train.

    Raises:
        ValueError: it is, or there is no dictionary.
    """
    if cfg.from_pretrained_path is None:
        return None
    folder, wanted = Path(cfg.from_pretrained_path), cfg.sae.architecture()
    try:
        saved = json.loads((folder / SAE_CFG_FILENAME).read_text())
        found = saved["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"from_pretrained_path={cfg.from_pretrained_path!r} holds no dictionary: a checkpoint has a "
            f"{SAE_CFG_FILENAME} in it, which says its architecture."
        ) from None
    if found != wanted:
        raise ValueError(
            f"from_pretrained_path={cfg.from_pretrained_path!r} holds a {found!r}, and the run is of a "
            f"{wanted!r}: give a checkpoint of such a run, not the model that it saved at its end."
        )
    return saved


def check_pretrained(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """As `require_pretrained`, and warn of other settings than the config's.

    SAELens trains with those that the dictionary was saved with.
    """
    saved = require_pretrained(cfg)
    if saved is None:
        return
    ours = json.loads(json.dumps(cfg.sae.to_dict()))
    ours["hook_name_out"] = saved.get("hook_name_out")  # which is recorded as it is in this run
    if differences := _differences(saved, ours):
        warnings.warn(
            f"from_pretrained_path={cfg.from_pretrained_path!r}: SAELens trains with the settings of the "
            f"dictionary it loads, not with those of this config ({'; '.join(differences)}).",
            stacklevel=2,
        )


def require_own_output_path(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse an output_path that holds the result of another run.

    The same settings again may overwrite their own result.
    """
    if cfg.output_path is None:
        return
    folder = Path(cfg.output_path)
    if not folder.exists() and (fault := obstacle(folder)):
        raise ValueError(f"output_path={cfg.output_path!r} cannot be made: {fault}.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_path={cfg.output_path!r} is a file: name a folder.")
    if not any((folder / name).exists() for name in (RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME)):
        return
    try:
        saved = json.loads((folder / RUNNER_CFG_FILENAME).read_text())
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(
            f"output_path={cfg.output_path!r} holds a model whose settings ({RUNNER_CFG_FILENAME}) cannot be "
            "read. Choose another output_path, or move that folder away."
        )
    ours = json.loads(json.dumps(cfg.to_dict()))
    differences = _differences(saved, ours)
    if differences:
        shown = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        raise ValueError(
            f"output_path={cfg.output_path!r} holds the result of another run ({shown}). Choose another "
            "output_path, or move that folder away."
        )


def _differences(saved: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted((saved.keys() | ours.keys()) - _VOLATILE):
        old, new = saved.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} here")
    return found


# ---- the trainer


@dataclass
class _Additions:
    """What we add to one trainer.

    The trainer itself holds it: observers often refer to their trainer, and whatever else held them would
    keep it, with its weights, alive for good.
    """

    observers: list[Observer] = field(default_factory=list)
    prepared: bool = False


def _additions(trainer: SAETrainer[Any, Any]) -> _Additions:
    return vars(trainer).setdefault("_saelens_matryoshka", _Additions())


def observe(trainer: SAETrainer[Any, Any], observer: Observer) -> None:
    """Have `observer(trainer, step_output)` called after every step of a trainer of ours.

    The step is complete then, its counters too: what is saved there can be continued from. Observers are
    called in the order they were added, before the trainer trains.
    """
    _additions(trainer).observers.append(observer)


def prepare_trainer(trainer: SAETrainer[Any, Any]) -> None:
    """Give a trainer of one of our architectures what the stock one lacks, once, before it trains."""
    ours = _additions(trainer)
    if not ours.prepared:  # a run that was interrupted may call `fit` again
        _add_what_is_missing(trainer)
        ours.prepared = True


def _add_what_is_missing(trainer: SAETrainer[Any, Any]) -> None:
    fuse_adam(trainer.optimizer)
    if isinstance(trainer.sae.step_fn, SparseStep):
        hand_back_gradients(trainer.optimizer, trainer.sae.step_fn.give_back)
    trainer.sae.finite.watch(trainer.optimizer, [trainer.sae.b_enc, trainer.sae.b_dec])
    trainer.activation_scaler = FiniteScaler(trainer.activation_scaler, trainer.sae)
    save_if_due = defer_checkpoints(trainer)
    replace_progress_bar(trainer, functools.partial(_after_step, trainer, save_if_due, ProgressBar(trainer)))
    stock = trainer.evaluator
    if not isinstance(stock, LLMSaeEvaluator):  # synthetic data: no language model
        return
    store = stock.activations_store
    if isinstance(trainer.data_provider, PrefetchingIterator) and isinstance(store, ResumableStore):
        trainer.data_provider = PrefetchedBatches(trainer.data_provider, store)
    reading: Reading = getattr(store, "reading", Reading(Site(store.hook_name)))
    _say_what_it_is_trained_on(trainer.sae, reading)
    trainer.sae.cfg.metadata.input_frame = norm_frame(store.model, store.hook_name)
    if reading.source.gain is not None:
        trainer.sae.set_input_gain(reading.source.gain, reading.source.offset)
    trainer.evaluator = held_out_evaluator(stock)


def _say_what_it_is_trained_on(sae: Any, reading: Reading) -> None:
    """Record a loaded transcoder's target as it is in this run, as SAELens does with its source.

    Raises:
        ValueError: the dictionary given is not one for the data of the run.
    """
    target = reading.target_hook
    given = "from_pretrained_path or override_sae"
    if isinstance(sae, MatryoshkaTrainingTranscoder) != (target is not None):
        wanted = "an SAE" if target is None else "a transcoder"
        raise ValueError(
            f"{given}: the dictionary is a {sae.cfg.architecture()!r}, but the run's config describes "
            f"{wanted}. Give a dictionary of the architecture of the config."
        )
    if target is None:
        return
    in_run = "none" if reading.source.gain is None else "norm_weight"
    if sae.cfg.input_gain != in_run:
        raise ValueError(
            f"input_gain={in_run!r}, but the dictionary of {given} was made with "
            f"input_gain={sae.cfg.input_gain!r}: it would be saved for another tensor than it is trained on. "
            f"Set input_gain={sae.cfg.input_gain!r}."
        )
    sae.cfg.hook_name_out = sae.cfg.metadata.hook_name_out = target


def held_out_evaluator(stock: LLMSaeEvaluator[Any]) -> HeldOutEvaluator | CachedEvaluator | None:
    """What evaluates on text held out of the training data; None if there is none."""
    store: Any = stock.activations_store
    if isinstance(store, CachedActivationsStore):
        has_rows = bool(store.cache.manifest.held_out)
        return CachedEvaluator(functools.partial(evaluate_cached, cache=store.cache)) if has_rows else None
    return HeldOutEvaluator.in_place_of(stock)


def complete_step(trainer: SAETrainer[Any, Any], step_output: TrainStepOutput) -> None:
    """What is done after every step, when its counters have advanced."""
    if trainer.n_training_samples >= trainer.cfg.total_training_samples:
        trainer.sae.finite.settle()
    for observer in _additions(trainer).observers:
        observer(trainer, step_output)


def _after_step(
    trainer: SAETrainer[Any, Any],
    save_if_due: Callable[[], None],
    bar: ProgressBar,
    step_output: TrainStepOutput,
    pbar: tqdm,  # type: ignore[type-arg]
    update_interval: int = 100,  # noqa: ARG001  (the stock signature)
) -> None:
    bar.update(pbar, functools.partial(summary, trainer, step_output, pbar))
    complete_step(trainer, step_output)
    save_if_due()
