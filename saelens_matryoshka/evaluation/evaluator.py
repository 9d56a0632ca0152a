"""Evaluate every prefix of an SAE or transcoder on held-out tokens, in one pass for all of them.

1. Reconstruction: the language model runs once per batch; source and target are read, every prefix's
   prediction is compared with the target.
2. Next-token predictions: on the first tokens again, the target is replaced by each prefix's prediction,
   by zeros and by the mean found in the first pass.

Nothing is trained or moved: a training object is converted to the inference model it would be saved as.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.config import HfDataset
from sae_lens.util import get_special_token_ids

from saelens_matryoshka.evaluation.metrics import FiringCounts, NextTokenSums, ReconstructionSums
from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths, predict_prefixes
from saelens_matryoshka.seams import token_device
from saelens_matryoshka.sites import check_hook, norm_frame


@torch.no_grad()
def evaluate(
    sae: SAE[Any],
    model: Any,
    dataset: HfDataset | str | torch.Tensor,
    *,
    n_tokens: int = 100_000,
    n_ce_tokens: int = 20_000,
    context_size: int | None = None,
    batch_size_prompts: int = 8,
    exclude_special_tokens: bool | list[int] = True,
) -> EvalResult:
    """Metrics of every prefix.

    Args:
        sae: SAE or transcoder, ours or stock; `metadata.hook_name` (and `hook_name_out`) say what it reads
            and predicts.
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        dataset: Held-out text: a dataset, a path `datasets.load_dataset` takes, or tokens
            `[prompts, context_size]`.
        n_tokens: Tokens for FVU, L0 and dead latents.
        n_ce_tokens: Tokens for cross-entropy and KL; 0 leaves them out.
        context_size: Tokens per prompt. None: what the SAE was trained with.
        batch_size_prompts: Prompts per forward pass.
        exclude_special_tokens: Leave BOS, EOS, padding and the like (or the given ids) out of all
            metrics; at their positions the target is not replaced.

    Returns:
        The metrics, with what they were measured on.

    Raises:
        ValueError: the model has no such hook, its norms are folded otherwise than those of the model the
            SAE was trained on, or the dataset has no tokens.
    """
    sae = inference_model(sae)
    metadata = sae.cfg.metadata
    source_hook, target_hook = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
    check_hook(model, source_hook, "hook_name")
    check_hook(model, target_hook, "hook_name_out")
    frame = norm_frame(model, source_hook)
    if metadata.input_frame not in (None, frame):
        raise ValueError(
            f"input_frame: this model was trained on {source_hook!r} in the frame "
            f"{metadata.input_frame!r}, but in this language model it is {frame!r}. Load the language "
            "model with its norms folded (fold_ln) as in training."
        )
    run = _Evaluation(sae, model, source_hook, target_hook)
    run.excluded = _excluded_ids(model, exclude_special_tokens)
    batches = list(_token_batches(sae, model, dataset, n_tokens, context_size, batch_size_prompts))
    was_training = model.training
    model.eval()
    try:
        for tokens in batches:
            run.add_reconstruction(tokens)
        n_seen = 0
        for tokens in batches:
            if n_seen >= n_ce_tokens:
                break
            run.add_next_token(tokens)
            n_seen += tokens.numel()
    finally:
        model.train(was_training)
    return run.result(frame)


class _Evaluation:
    """The sums of one evaluation, and how a batch of tokens is added to them."""

    def __init__(self, sae: SAE[Any], model: Any, source_hook: str, target_hook: str) -> None:
        self.sae, self.model = sae, model
        self.source_hook, self.target_hook = source_hook, target_hook
        self.widths = matryoshka_widths(sae)
        self.excluded: torch.Tensor | None = None
        device = torch.device(sae.device)
        d_out = sae.W_dec.shape[-1]
        self.reconstruction = ReconstructionSums(len(self.widths), d_out, device)
        self.firing = FiringCounts(sae.cfg.d_sae, device)
        self.clean, self.zero, self.mean = NextTokenSums(), NextTokenSums(), NextTokenSums()
        self.prefixes = [NextTokenSums() for _ in self.widths]

    def add_reconstruction(self, tokens: torch.Tensor) -> None:
        keep = self._evaluated(tokens)
        source, target = self._activations(tokens)
        source, target = source[keep], target[keep]
        acts = self.sae.encode(source)
        self.firing.add(acts)
        self.reconstruction.add(target, predict_prefixes(self.sae, source, acts))

    def add_next_token(self, tokens: torch.Tensor) -> None:
        keep = self._evaluated(tokens)
        source, target = self._activations(tokens)
        predictions = predict_prefixes(self.sae, source, self.sae.encode(source))
        mean = self.reconstruction.mean().expand_as(target)
        clean = self.model(tokens, return_type="logits")
        # predictions of a token that counts
        counted = torch.zeros_like(keep)
        counted[:, :-1] = keep[:, 1:].to(counted.device)
        labels = tokens.roll(-1, dims=1)[counted]
        clean = clean[counted.to(clean.device)]
        self.clean.add(clean, clean, labels)
        for sums, replacement in (
            (self.zero, torch.zeros_like(target)),
            (self.mean, mean),
            *zip(self.prefixes, predictions, strict=True),
        ):
            logits = self.model.run_with_hooks(
                tokens,
                return_type="logits",
                fwd_hooks=[(self.target_hook, _replace(replacement, keep))],
            )
            sums.add(logits[counted.to(logits.device)], clean, labels)

    def result(self, frame: str) -> EvalResult:
        with_ce = self.clean.n_tokens > 0
        clean = self.clean.mean_ce() if with_ce else None
        zero = self.zero.mean_ce() if with_ce else None
        mean = self.mean.mean_ce() if with_ce else None
        rows: list[PrefixMetrics] = []
        fvu = self.reconstruction.fvu().tolist()
        for level, (width, sums) in enumerate(zip(self.widths, self.prefixes, strict=True)):
            ce = sums.mean_ce() if with_ce else None
            rows.append(
                PrefixMetrics(
                    width=width,
                    fvu=fvu[level],
                    l0=self.firing.l0(width),
                    n_dead=self.firing.n_dead(width),
                    ce=ce,
                    ce_recovered=_recovered(ce, clean, zero),
                    ce_recovered_mean=_recovered(ce, clean, mean),
                    kl=sums.mean_kl() if with_ce else None,
                )
            )
        return EvalResult(
            prefixes=rows,
            n_tokens=self.reconstruction.n_tokens,
            n_ce_tokens=self.clean.n_tokens,
            hook_name=self.source_hook,
            hook_name_out=self.target_hook,
            input_frame=frame,
            ce_clean=clean,
            ce_zero=zero,
            ce_mean=mean,
        )

    def _evaluated(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mask `[prompts, context_size]` of the positions that count."""
        keep = torch.zeros_like(tokens, dtype=torch.bool)
        keep[:, slice(*(self.sae.cfg.metadata.seqpos_slice or (None,)))] = True
        if self.excluded is not None:
            keep &= ~torch.isin(tokens, self.excluded.to(tokens.device))
        return keep.to(self.sae.device)

    def _activations(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and target `[prompts, context_size, d]`, heads flattened, on the SAE's device."""
        seen: dict[str, torch.Tensor] = {}
        # By the name asked for: a TransformerBridge's names may be aliases of the hook's own.
        names = dict.fromkeys([self.source_hook, self.target_hook])
        self.model.run_with_hooks(
            tokens, fwd_hooks=[(name, functools.partial(_read, seen, name)) for name in names]
        )
        source, target = seen[self.source_hook], seen[self.target_hook]
        if (head := self.sae.cfg.metadata.hook_head_index) is not None:
            source = source[:, :, head]
            target = target[:, :, head] if self.target_hook == self.source_hook else target
        place = {"device": self.sae.device, "dtype": self.sae.dtype}
        return source.flatten(2).to(**place), target.flatten(2).to(**place)


def _read(
    seen: dict[str, torch.Tensor],
    name: str,
    activation: torch.Tensor,
    hook: Any,  # noqa: ARG001
) -> None:
    seen[name] = activation


def _replace(replacement: torch.Tensor, keep: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook_fn(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        flat = activation.flatten(2)
        mask = keep[..., None].to(flat.device)
        return torch.where(mask, replacement.to(flat), flat).view_as(activation)

    return hook_fn


def _recovered(ce: float | None, clean: float | None, ablated: float | None) -> float | None:
    if ce is None or clean is None or ablated is None or ablated == clean:
        return None
    return (ablated - ce) / (ablated - clean)


def _excluded_ids(model: Any, exclude: bool | list[int]) -> torch.Tensor | None:
    if exclude is True:
        tokenizer = getattr(model, "tokenizer", None)
        exclude = get_special_token_ids(tokenizer) if tokenizer is not None else []
    return torch.tensor(exclude, dtype=torch.long) if exclude else None


def _token_batches(
    sae: SAE[Any],
    model: Any,
    dataset: HfDataset | str | torch.Tensor,
    n_tokens: int,
    context_size: int | None,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """Batches `[prompts, context_size]` on the model's device, together about `n_tokens` tokens."""
    device = token_device(model)
    if isinstance(dataset, torch.Tensor):
        n_prompts = -(-n_tokens // dataset.shape[1])
        prompts = iter(dataset[:n_prompts])
    else:
        store = _token_store(sae, model, dataset, context_size)
        n_prompts = -(-n_tokens // store.context_size)
        prompts = _prompts(store, n_prompts)
    batch: list[torch.Tensor] = []
    n_batches = 0
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == batch_size:
            yield torch.stack(batch).to(device)
            batch, n_batches = [], n_batches + 1
    if batch:
        yield torch.stack(batch).to(device)
        n_batches += 1
    if n_batches == 0:
        raise ValueError("dataset: it holds no full prompt, so there is nothing to evaluate on.")


def _prompts(store: ActivationsStore, n_prompts: int) -> Iterator[torch.Tensor]:
    for _ in range(n_prompts):
        try:
            yield store.get_batch_tokens(1, raise_at_epoch_end=True)[0]
        except StopIteration:
            return


def _token_store(
    sae: SAE[Any], model: Any, dataset: HfDataset | str, context_size: int | None
) -> ActivationsStore:
    separator = sae.cfg.metadata.get("sequence_separator_token", "bos")
    try:
        return ActivationsStore.from_sae(
            model,
            sae,
            dataset,
            context_size=context_size,
            sequence_separator_token=separator,
            disable_concat_sequences=bool(sae.cfg.metadata.disable_concat_sequences),
            total_tokens=0,
        )
    except StopIteration:
        raise ValueError("dataset: it is empty, so there is nothing to evaluate on.") from None
