"""The evaluation that SAELens's trainer runs now and then while a transcoder trains.

SAELens's own replaces the hook it reads, which for a transcoder is the wrong one, and takes its tokens
from the training data. This one replaces `hook_name_out`, on tokens set aside before training.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator

from saelens_matryoshka.architectures import MatryoshkaTrainingTranscoder
from saelens_matryoshka.evaluation.evaluator import evaluate
from saelens_matryoshka.pairs import PairedActivationsStore
from saelens_matryoshka.prefixes import inference_model


@dataclass
class TranscoderEvaluator:
    """Called by the trainer as `evaluator(sae, data_provider, activation_scaler)`."""

    model: Any
    tokens: torch.Tensor
    """`[prompts, context_size]`, never trained on"""
    batch_size_prompts: int
    exclude_special_tokens: list[int] | bool

    @classmethod
    def from_stock(cls, stock: LLMSaeEvaluator[Any], store: PairedActivationsStore) -> TranscoderEvaluator:
        """The same evaluation settings, for a transcoder."""
        batch_size = stock.eval_batch_size_prompts or store.store_batch_size_prompts
        excluded = store.exclude_special_tokens
        return cls(
            model=stock.model,
            tokens=store.held_out_tokens,
            batch_size_prompts=batch_size,
            exclude_special_tokens=False if excluded is None else excluded.tolist(),
        )

    def __call__(
        self,
        sae: MatryoshkaTrainingTranscoder,
        data_provider: Any,
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        if len(self.tokens) == 0:
            return {}
        model = inference_model(sae)
        if activation_scaler.scaling_factor is not None:
            model.fold_activation_norm_scaling_factor(activation_scaler.scaling_factor)
        # The prefetcher's thread runs the same language model, whose hooks we are about to change.
        prefetching = isinstance(data_provider, PrefetchingIterator)
        with data_provider.paused() if prefetching else nullcontext():
            result = evaluate(
                model,
                self.model,
                self.tokens,
                n_tokens=self.tokens.numel(),
                n_ce_tokens=self.tokens.numel(),
                batch_size_prompts=self.batch_size_prompts,
                exclude_special_tokens=self.exclude_special_tokens,
            )
        metrics: dict[str, Any] = {"held_out/ce_clean": result.ce_clean}
        for prefix in result.prefixes:
            for name in ("fvu", "l0", "dead_fraction", "ce_recovered", "kl"):
                metrics[f"held_out/{name}_w{prefix.width}"] = getattr(prefix, name)
        return metrics
