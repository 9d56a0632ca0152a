"""Several SAEs or transcoders of one target, measured on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from sae_lens import SAE
from sae_lens.config import HfDataset

from saelens_matryoshka.evaluation.evaluator import Evaluation
from saelens_matryoshka.evaluation.passes import Passes, Progress
from saelens_matryoshka.evaluation.result import EvalResult, metrics_table
from saelens_matryoshka.evaluation.tokens import token_batches
from saelens_matryoshka.files.unfinished import Unfinished
from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.prefixes import inference_model


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several models on the same tokens."""

    results: dict[str, EvalResult]
    """by the models' names"""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {name: result.to_dict() for name, result in self.results.items()}

    def to_json(self) -> str:
        """`to_dict` as indented JSON, with null for NaN."""
        return dumps(self.to_dict(), indent=2)

    def tables(self) -> Group:
        """A table per model, one row per prefix, for rich; fits 80 columns."""
        first = next(iter(self.results.values()))
        parts: list[Any] = [f"Predictions of [bold]{first.hook_name_out}[/]\n"]
        for name, result in self.results.items():
            reads = f"[bold]{escape(str(name))}[/] reads {result.hook_name} ({result.input_frame})"
            parts += [reads, metrics_table(result)]
            if result.prefixes[-1].fvu > 1:
                parts.append("[yellow]worse than predicting the mean: probably made for another frame[/]\n")
        with_ce = f"; CE and KL on {first.n_ce_tokens:,} of them" if first.n_ce_tokens else ""
        parts.append(f"{first.n_tokens:,} tokens for all{with_ce}")
        return Group(*parts)


@torch.no_grad()
def compare(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    dataset: HfDataset | list[Any] | str | torch.Tensor,
    *,
    n_tokens: int = 100_000,
    n_ce_tokens: int = 20_000,
    context_size: int | None = None,
    batch_size_prompts: int = 8,
    exclude_special_tokens: bool | list[int] = True,
    model_kwargs: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    unfinished: Unfinished | None = None,
) -> Comparison:
    """Evaluate several SAEs or transcoders, each in its own frame, on the same tokens.

        found = sm.compare({"nested": nested, "plain": plain}, model, dataset)
        found.results["nested"].prefixes[-1].fvu

    Args:
        saes: By name. All predict the same hook; what they read may differ.
        model: The language model of all of them.
        dataset: As for `evaluate`; tokenised the way the first model's training data were.
        n_tokens: Tokens for all metrics but cross-entropy and KL.
        n_ce_tokens: Tokens for cross-entropy and KL; 0 leaves them out.
        context_size: Tokens per prompt. None: the shortest that any of them was trained with.
        batch_size_prompts: Prompts per forward pass.
        exclude_special_tokens: As for `evaluate`.
        model_kwargs: Passed on when the language model is called.
        on_progress: As for `evaluate`, of one model after the other.
        unfinished: As for `evaluate`: where the sums of all models are kept until the end.

    Returns:
        An evaluation of each, by its name.

    Raises:
        RunStopped: SIGINT or SIGTERM has come, and the state is kept in `unfinished`.
        ValueError: they predict different hooks, so that their numbers do not compare, or one of them does
            not fit the language model or its frame.
    """
    if not isinstance(saes, Mapping):
        raise ValueError(f"saes is a {type(saes).__name__}, and must be a dict of models by their names.")
    if not saes:
        raise ValueError("saes is empty: give at least one model to compare.")
    models = {name: inference_model(sae) for name, sae in saes.items()}
    evaluations = {
        name: Evaluation(sae, model, exclude_special_tokens, model_kwargs) for name, sae in models.items()
    }
    targets = {name: evaluation.target_hook for name, evaluation in evaluations.items()}
    if len(set(targets.values())) > 1:
        said = "; ".join(f"{name} predicts {target!r}" for name, target in targets.items())
        raise ValueError(
            f"hook_name_out differs ({said}): errors in different targets do not compare. Compare models of "
            "one target."
        )
    slices = {name: tuple(sae.cfg.metadata.seqpos_slice or (None,)) for name, sae in models.items()}
    if len(set(slices.values())) > 1:
        raise ValueError(f"seqpos_slice differs ({slices}), so they would be measured on different tokens.")
    first = next(iter(models.values()))
    if context_size is None:
        sizes = (sae.cfg.metadata.context_size for sae in models.values())
        context_size = min(filter(None, sizes), default=None)
    batches = token_batches(first, model, dataset, n_tokens, context_size, batch_size_prompts)
    Passes(list(evaluations.values()), list(batches), n_ce_tokens).run(on_progress, unfinished)
    return Comparison(
        {name: evaluation.result(with_redundancy=True) for name, evaluation in evaluations.items()}
    )
