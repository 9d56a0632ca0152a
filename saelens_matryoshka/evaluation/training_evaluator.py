"""The evaluation that SAELens's trainer runs now and then while one of our architectures trains.

SAELens's own starts the training data over, and replaces the hook the model reads, which for a transcoder is
the wrong one. This one replaces the hook that is predicted, on prompts set aside before training, for every
prefix, and leaves everything as it was: a run with evaluations ends with the weights of a run without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens import SAE, ActivationsStore, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_matryoshka.architectures import MatryoshkaTraining, MatryoshkaTrainingTranscoder
from saelens_matryoshka.evaluation.evaluator import evaluate
from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.ops import ALONE, Group
from saelens_matryoshka.prefixes import as_saved
from saelens_matryoshka.scaling import fold_scaling
from saelens_matryoshka.seams import split_off_prompts

_held_out: WeakKeyDictionary[ActivationsStore, torch.Tensor] = WeakKeyDictionary()


def hold_out_prompts(store: ActivationsStore, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Take the first documents of the dataset out of the training data, for `HeldOutEvaluator`.

    They give `n_eval_batches` batches of `eval_batch_size_prompts` (else `store_batch_size_prompts`) prompts,
    whether or not this run logs to W&B, so that logging does not change what is trained on. Activations
    cached on disk have been made from all documents: nothing is set aside then.

    Raises:
        ValueError: the run would be evaluated, and the dataset is too small for both.
    """
    if store.dataset is None or cfg.use_cached_activations or cfg.n_eval_batches <= 0:
        return
    wanted = cfg.n_eval_batches * (cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts)
    prompts = split_off_prompts(store, wanted, leaving=store.store_batch_size_prompts)
    if prompts is not None:
        _held_out[store] = prompts
    elif cfg.logger.log_to_wandb:
        raise ValueError(
            f"n_eval_batches={cfg.n_eval_batches} sets {wanted} prompts aside for evaluation, and "
            f"dataset_path={cfg.dataset_path!r} has too little text for these and training. Lower "
            "n_eval_batches, or use more text."
        )


def share_held_out(store: ActivationsStore, part: Any) -> None:
    """Have what stands in for a part of a store evaluated on the prompts that were held out of the store."""
    if store in _held_out:
        _held_out[part] = _held_out[store]


@dataclass
class HeldOutEvaluator:
    """Called by the trainer as `evaluator(sae, data_provider, activation_scaler)`."""

    model: Any
    tokens: torch.Tensor
    """`[prompts, context_size]`, never trained on"""
    batch_size_prompts: int
    exclude_special_tokens: list[int] | bool
    model_kwargs: dict[str, Any]

    @classmethod
    def in_place_of(cls, stock: LLMSaeEvaluator[Any]) -> HeldOutEvaluator | None:
        """The same evaluation settings on the prompts held out of the store; None if there are none."""
        store = stock.activations_store
        tokens = _held_out.get(store)
        if tokens is None:
            return None
        excluded = store.exclude_special_tokens
        return cls(
            model=stock.model,
            tokens=tokens,
            batch_size_prompts=stock.eval_batch_size_prompts or store.store_batch_size_prompts,
            exclude_special_tokens=False if excluded is None else excluded.tolist(),
            model_kwargs=stock.model_kwargs,
        )

    def __call__(
        self,
        sae: MatryoshkaTraining,
        data_provider: Any,
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        model = _as_saved(sae, activation_scaler)
        # The prefetcher's thread runs the same language model, whose hooks we are about to change.
        paused = getattr(data_provider, "paused", nullcontext)
        with paused():
            return logged_metrics(self.result(model, sae.group, with_redundancy=False))

    def result(self, model: SAE[Any], group: Group = ALONE, *, with_redundancy: bool = True) -> EvalResult:
        """Every prefix of an inference model, or of a group's shards or copies of one, on the held-out
        prompts."""
        return evaluate(
            model,
            self.model,
            self.tokens,
            n_tokens=self.tokens.numel(),
            n_ce_tokens=self.tokens.numel(),
            batch_size_prompts=self.batch_size_prompts,
            exclude_special_tokens=self.exclude_special_tokens,
            model_kwargs=self.model_kwargs,
            with_redundancy=with_redundancy,
            group=group,
        )


@dataclass
class CachedEvaluator:
    """The same on a cache's held-out rows: what needs no language model."""

    result: Callable[..., EvalResult]
    """as `saelens_matryoshka.cache.store.evaluate_cached`, of the cache"""

    def __call__(
        self,
        sae: MatryoshkaTraining,
        data_provider: Any,  # noqa: ARG002  (held-out rows are read apart from the stream)
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        model = _as_saved(sae, activation_scaler)
        return logged_metrics(self.result(model, with_redundancy=False, group=sae.group))


def logged_metrics(result: EvalResult) -> dict[str, Any]:
    """What is logged: the whole dictionary under SAELens's names, every prefix under `held_out/`."""
    full = result.prefixes[-1]
    metrics: dict[str, Any] = {
        "reconstruction_quality": {
            "explained_variance": full.explained_variance,
            "cossim": full.cosine,
        },
        "sparsity": {"l0": full.l0},
    }
    per_prefix = ["fvu", "l0", "dead_fraction"]
    if result.ce_clean is not None:
        metrics["model_performance_preservation"] = {
            "ce_loss_score": full.ce_recovered,
            "ce_loss_with_ablation": result.ce_zero,
            "ce_loss_with_sae": full.ce,
            "ce_loss_without_sae": result.ce_clean,
        }
        metrics["held_out/ce_clean"] = result.ce_clean
        per_prefix += ["ce_recovered", "kl"]
    for prefix in result.prefixes:
        for name in per_prefix:
            metrics[f"held_out/{name}_w{prefix.width}"] = getattr(prefix, name)
    return metrics


def _as_saved(sae: MatryoshkaTraining, scaler: ActivationScaler) -> SAE[Any]:
    """The model that would be saved if training ended now: the trainer's scaling folded, then the rest."""
    if isinstance(sae, MatryoshkaTrainingTranscoder):  # which has a gain to fold after it
        with sae.scaled_by(1.0 if scaler.scaling_factor is None else scaler.scaling_factor):
            model = as_saved(sae)
        model.cfg.normalize_activations = "none"
        return model
    model = as_saved(sae)
    fold_scaling(model, scaler)
    return model
