"""Evaluate every prefix of an SAE or transcoder on held-out tokens, in one pass for all of them.

1. Reconstruction: the language model runs once per batch; source and target are read, every prefix's
   prediction is compared with the target.
2. Next-token predictions: on the first tokens again, the target is replaced by each prefix's prediction,
   by zeros and by the mean found in the first pass. What comes before the target's layer is not run again.

Nothing is trained or moved: a training object is converted to the inference model it would be saved as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import HfDataset

from saelens_matryoshka.evaluation.activations import hook_activations, require_width
from saelens_matryoshka.evaluation.metrics import (
    FiringCounts,
    NextTokenSums,
    ReconstructionSums,
    decoder_redundancy,
    summed,
)
from saelens_matryoshka.evaluation.passes import Passes, Progress
from saelens_matryoshka.evaluation.replacement import Replacement
from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics
from saelens_matryoshka.evaluation.tokens import is_excluded, require_count, special_token_ids, token_batches
from saelens_matryoshka.files.unfinished import Unfinished
from saelens_matryoshka.ops import ALONE, Group
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths, predict_prefixes
from saelens_matryoshka.sites import check_hook, norm_frame
from saelens_matryoshka.widths import cumulative_widths

# Values of feature activations, and of logits, that are held at a time.
_ACTIVATION_VALUES = 1 << 26
_LOGIT_VALUES = 1 << 29


@torch.no_grad()
def evaluate(
    sae: SAE[Any],
    model: Any,
    dataset: HfDataset | list[Any] | str | torch.Tensor,
    *,
    n_tokens: int = 100_000,
    n_ce_tokens: int = 20_000,
    context_size: int | None = None,
    batch_size_prompts: int = 8,
    exclude_special_tokens: bool | list[int] = True,
    model_kwargs: Mapping[str, Any] | None = None,
    with_redundancy: bool = True,
    group: Group = ALONE,
    on_progress: Progress | None = None,
    unfinished: Unfinished | None = None,
) -> EvalResult:
    """FVU, L0, dead latents, CE recovered and KL of every prefix, on held-out text.

        result = sm.evaluate(sae, model, dataset)
        result.prefixes[0].fvu  # of the narrowest prefix; the last is the whole dictionary
        print(result.to_json())

    Args:
        sae: SAE or transcoder, ours or stock; `metadata.hook_name` (and `hook_name_out`) say what it reads
            and predicts. A model without recorded widths has one prefix, itself.
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        dataset: Held-out text: a dataset, a list of texts or of rows, a path `datasets.load_dataset` takes,
            or tokens `[prompts, context_size]`.
        n_tokens: Tokens for all metrics but cross-entropy and KL.
        n_ce_tokens: Tokens for cross-entropy and KL; 0 leaves them out.
        context_size: Tokens per prompt. None: what the SAE was trained with.
        batch_size_prompts: Prompts per forward pass.
        exclude_special_tokens: Leave BOS, EOS, padding and the like (or the given ids) out of all
            metrics; at their positions the target is not replaced.
        model_kwargs: Passed on when the language model is called.
        with_redundancy: Compute `decoder_redundancy` too: it takes a product of d_sae² by d_out.
        group: The processes that evaluate it together, of which `sae` is this one's shard or copy. Each runs
            its language model on its part of the text, and all return the same.
        on_progress: Called with what is measured, and the numbers of tokens done and to do.
        unfinished: Where the sums are kept until the end, and taken from if they are there: an evaluation
            that was ended goes on, and gives the same numbers. The caller removes it once they are safe.
            None: nowhere. Not for a group.

    Returns:
        The metrics, with what they were measured on.

    Raises:
        RunStopped: SIGINT or SIGTERM has come, and the state is kept in `unfinished`.
        ValueError: a number is out of range, the model has no such hook, its norms are folded otherwise than
            those of the model the SAE was trained on, or the dataset has no tokens, or none that counts.
    """
    if unfinished is not None and group is not ALONE:
        raise ValueError("unfinished: what each of several processes has is not kept. Leave it out.")
    if isinstance(dataset, torch.Tensor) and context_size not in (None, dataset.shape[-1]):
        raise ValueError(
            f"context_size={context_size}, but the tokens given are prompts of {dataset.shape[-1]}: cut "
            "them, or leave context_size out."
        )
    require_count("batch_size_prompts", batch_size_prompts, 1)
    sae = inference_model(sae)
    evaluation = Evaluation(sae, model, exclude_special_tokens, model_kwargs, group)
    n_prompts = batch_size_prompts * group.size
    batches = list(token_batches(sae, model, dataset, n_tokens, context_size, n_prompts))
    Passes([evaluation], batches, n_ce_tokens).run(on_progress, unfinished)
    return evaluation.result(with_redundancy=with_redundancy)


@torch.no_grad()
def evaluate_activations(
    sae: SAE[Any],
    model: Any,
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    with_redundancy: bool = True,
    group: Group = ALONE,
) -> EvalResult:
    """The metrics that need no language model: all but cross-entropy and KL.

    Args:
        sae: As in `evaluate`.
        model: Says in which frame the source is; it is not run.
        pairs: Sources `[n, d_in]` and targets `[n, d_out]`, on the SAE's device.
        with_redundancy: As in `evaluate`.
        group: As in `evaluate`; the pairs are the same in all processes.
    """
    evaluation = Evaluation(inference_model(sae), model, exclude_special_tokens=False, group=group)
    for source, target in pairs:
        evaluation.add_pairs(group.part(source), group.part(target))
    return evaluation.result(with_redundancy=with_redundancy)


class Evaluation:
    """The sums of one evaluation, and how a batch of tokens is added to them. See `evaluate`.

    All processes of a group add the same batches; the sums of each are of its part of them.
    """

    def __init__(
        self,
        sae: SAE[Any],
        model: Any,
        exclude_special_tokens: bool | list[int],
        model_kwargs: Mapping[str, Any] | None = None,
        group: Group = ALONE,
    ) -> None:
        self.sae, self.model, self.model_kwargs, self.group = sae, model, dict(model_kwargs or {}), group
        self.source_hook, self.target_hook, self.frame = hooks_and_frame(sae, model)
        # By the name asked for: a TransformerBridge's names may be aliases of the hook's own.
        self.read_hooks = list(dict.fromkeys([self.source_hook, self.target_hook]))
        self.replacement = Replacement(model, self.target_hook, self.model_kwargs)
        self.source_head: int | None = sae.cfg.metadata.hook_head_index
        self.target_head = self.source_head if self.target_hook == self.source_hook else None
        self.widths = matryoshka_widths(sae)
        self.excluded = special_token_ids(model, exclude_special_tokens)
        device = torch.device(sae.device)
        d_out = sae.W_dec.shape[-1]
        self.reconstruction = ReconstructionSums(len(self.widths), d_out, device)
        self.firing = FiringCounts(len(sae.W_dec), device)
        self.clean, self.zero, self.mean = NextTokenSums(), NextTokenSums(), NextTokenSums()
        self.prefixes = [NextTokenSums() for _ in self.widths]

    @property
    def sums(self) -> dict[str, Any]:
        """All that changes when a batch is added, for `state_of` and `restore`."""
        names = ("reconstruction", "firing", "clean", "zero", "mean", "prefixes")
        return {name: getattr(self, name) for name in names}

    def add_reconstruction(self, tokens: torch.Tensor) -> None:
        """Add how near the predictions come to the target on tokens `[prompts, context_size]`."""
        tokens, keep = self._part(tokens)
        source, target = self._pair(hook_activations(self.model, tokens, self.read_hooks, self.model_kwargs))
        self.add_pairs(source[keep], target[keep])

    def add_pairs(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Add sources `[n, d_in]` and targets `[n, d_out]` of this process's part."""
        targets = iter(target.split(self._rows_at_a_time))
        for acts, predictions, is_own in self._predictions(source):
            self.firing.add(acts)
            if is_own:
                self.reconstruction.add(next(targets), predictions)

    def _predictions(self, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        """What every prefix makes of sources `[n, d_in]`, a few rows at a time.

        Yields:
            Activations `[rows, latents]` of this process's shard, predictions `[n_levels, rows, d_out]` of
            the whole dictionary, and whether they are of these sources, not of those of another shard.
        """
        with flattened_heads(self.sae):
            for rows, is_own in self.group.in_turn(source.to(self.sae.dtype)):
                for x in rows.split(self._rows_at_a_time):
                    acts = self.sae.encode(x)
                    yield acts, predict_prefixes(self.sae, x, acts, group=self.group), is_own

    @property
    def _rows_at_a_time(self) -> int:
        return max(1, _ACTIVATION_VALUES // self.sae.cfg.d_sae)

    def add_next_token(self, tokens: torch.Tensor) -> None:
        """Add what the language model predicts of tokens `[prompts, context_size]`, target replaced or not.

        To be called when all reconstructions have been added, which the mean target is taken from.
        """
        logits = self.model(tokens[:1, :1], return_type="logits", **self.model_kwargs)
        d_vocab = logits.shape[-1]
        prompts = max(1, _LOGIT_VALUES // (tokens.shape[1] * d_vocab))
        for part in tokens.split(prompts * self.group.size):
            self._add_next_token(*self._part(part))

    def _add_next_token(self, tokens: torch.Tensor, keep: torch.Tensor) -> None:
        clean, seen = self.model.run_with_cache(
            tokens,
            return_type="logits",
            names_filter=[*self.read_hooks, *self.replacement.hooks],
            **self.model_kwargs,
        )
        source, target = self._pair(seen)
        own = [predictions for _, predictions, is_own in self._predictions(source.flatten(0, 1)) if is_own]
        predictions = torch.cat(own, dim=1).unflatten(1, tokens.shape)
        mean = self.reconstruction.mean(self.group).expand_as(target)
        # What is predicted where the target is replaced, unless that is a special token.
        counted = torch.zeros_like(keep)
        counted[:, :-1] = keep[:, :-1] & ~is_excluded(tokens, self.excluded)[:, 1:].to(keep.device)
        labels = tokens.roll(-1, dims=1)[counted.to(tokens.device)]
        clean = clean[counted.to(clean.device)]
        self.clean.add(clean, clean, labels)
        for sums, replacement in (
            (self.zero, torch.zeros_like(target)),
            (self.mean, mean),
            *zip(self.prefixes, predictions, strict=True),
        ):
            hook_fn = _replace(replacement, keep, self.target_head)
            logits = self.replacement.logits(tokens, seen, hook_fn)
            sums.add(logits[counted.to(logits.device)], clean, labels)

    def result(self, *, with_redundancy: bool) -> EvalResult:
        """The metrics of all that was added.

        Raises:
            ValueError: none of it counts.
        """
        reconstruction = summed(self.reconstruction, self.group, "all")
        if reconstruction.n_tokens == 0:
            raise ValueError(
                "dataset: none of its tokens counts: all are left out by exclude_special_tokens, or by the "
                "seqpos_slice that this was trained with."
            )
        firing = self.firing.gathered(self.group)
        next_token = summed([self.clean, self.zero, self.mean, *self.prefixes], self.group, "all")
        n_ce_tokens = next_token[0].n_tokens
        with_ce = n_ce_tokens > 0
        clean, zero, mean, *prefix_ce = [sums.mean_ce() if with_ce else None for sums in next_token]
        rows: list[PrefixMetrics] = []
        fvu = reconstruction.fvu().tolist()
        cosine = reconstruction.mean_cosine().tolist()
        explained_variance = reconstruction.explained_variance()
        redundancy: list[float] | list[None] = [None] * len(self.widths)
        if with_redundancy and self.group is ALONE:
            redundancy = decoder_redundancy(self.sae.W_dec, self.widths)
        for level, (width, ce) in enumerate(zip(self.widths, prefix_ce, strict=True)):
            rows.append(
                PrefixMetrics(
                    width=width,
                    fvu=fvu[level],
                    explained_variance=explained_variance[level],
                    cosine=cosine[level],
                    l0=firing.l0(width),
                    n_dead=firing.n_dead(width),
                    density=firing.density_histogram(width),
                    decoder_redundancy=redundancy[level],
                    ce=ce,
                    ce_recovered=_recovered(ce, clean, zero),
                    ce_recovered_mean=_recovered(ce, clean, mean),
                    kl=next_token[3 + level].mean_kl() if with_ce else None,
                )
            )
        return EvalResult(
            prefixes=rows,
            n_tokens=reconstruction.n_tokens,
            n_ce_tokens=n_ce_tokens,
            hook_name=self.source_hook,
            hook_name_out=self.target_hook,
            input_frame=self.frame,
            train_l0=trained_k(self.sae),
            ce_clean=clean,
            ce_zero=zero,
            ce_mean=mean,
        )

    def _part(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's prompts of a batch, and the mask of their positions that count.

        Where it has none, one of which no position counts: a language model takes no empty batch.
        """
        own = self.group.part(tokens)
        if len(own):
            return own, self._evaluated(own)
        return tokens[:1], torch.zeros_like(tokens[:1], dtype=torch.bool, device=self.sae.device)

    def _evaluated(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mask `[prompts, context_size]` of the positions that count, where the target is replaced."""
        keep = torch.zeros_like(tokens, dtype=torch.bool)
        keep[:, slice(*(self.sae.cfg.metadata.seqpos_slice or (None,)))] = True
        return (keep & ~is_excluded(tokens, self.excluded)).to(self.sae.device)

    def _pair(self, seen: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and target `[prompts, context_size, d]`, heads flattened, on the SAE's device.

        In the language model's dtype: in that of the SAE, the target could be coarser.
        """
        source, target = seen[self.source_hook], seen[self.target_hook]
        if self.source_head is not None:
            source = source[:, :, self.source_head]
        if self.target_head is not None:
            target = target[:, :, self.target_head]
        require_width(self.source_hook, source, self.sae.cfg.d_in, "d_in")
        require_width(self.target_hook, target, self.sae.W_dec.shape[-1], "d_out")
        device = self.sae.device
        return source.flatten(2).to(device), target.flatten(2).to(device)


@contextmanager
def flattened_heads(sae: SAE[Any]) -> Iterator[None]:
    """Within, an SAE of `hook_z` takes and gives `[..., n_heads · d_head]`."""
    had_reshaping = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if had_reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()


def hooks_and_frame(sae: SAE[Any], model: Any) -> tuple[str, str, str]:
    """Source hook, target hook, and the frame of the source in this language model."""
    metadata = sae.cfg.metadata
    if not metadata.hook_name:
        raise ValueError(
            "hook_name: this model's metadata do not say which hook it reads. Set sae.cfg.metadata.hook_name "
            "(and hook_name_out for a transcoder)."
        )
    source_hook, target_hook = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
    check_hook(model, source_hook, "hook_name")
    check_hook(model, target_hook, "hook_name_out")
    frame = norm_frame(model, source_hook)
    if metadata.input_frame not in (None, frame):
        was_folded = metadata.input_frame == "normalized_folded"
        raise ValueError(
            f"input_frame: this model was trained on {source_hook!r} in the frame {metadata.input_frame!r}, "
            f"but in this language model it is {frame!r}. Load the language model as in training: "
            + (
                "with its norms folded (fold_ln=True)."
                if was_folded
                else "with from_pretrained_no_processing."
            )
        )
    return source_hook, target_hook, frame


def trained_k(sae: SAE[Any]) -> float | None:
    """The k of the whole dictionary in training, if `sae` is the whole dictionary and its metadata say it."""
    details = sae.cfg.metadata.training_architecture_details or {}
    k, widths = details.get("k"), details.get("matryoshka_widths")
    if not isinstance(k, int | float):
        return None
    try:
        cumulative_widths(widths or [sae.cfg.d_sae], sae.cfg.d_sae)
    except ValueError:  # of a prefix
        return None
    return float(k)


def _replace(replacement: torch.Tensor, keep: torch.Tensor, head: int | None) -> Callable[..., torch.Tensor]:
    """A hook that puts `[prompts, context_size, d]` in place of the activation, or of one head of it."""

    def hook_fn(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        part = activation if head is None else activation[:, :, head]
        mask = keep.view(*keep.shape, *[1] * (part.dim() - 2)).to(part.device)
        replaced = torch.where(mask, replacement.to(part).view_as(part), part)
        if head is None:
            return replaced
        return activation.index_copy(2, torch.tensor([head], device=part.device), replaced[:, :, None])

    return hook_fn


def _recovered(ce: float | None, clean: float | None, ablated: float | None) -> float | None:
    if ce is None or clean is None or ablated is None or ablated == clean:
        return None
    return (ablated - ce) / (ablated - clean)
