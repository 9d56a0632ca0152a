"""Pairs of activations, source and target, from one forward pass of the language model.

`PairedActivationsStore` is SAELens's `ActivationsStore` in its multi-hook form whose rows are
`[source | target]`: one row is one token, so SAELens's filtering, mixing buffer, prefetcher and trainer
carry the two together and cannot take them apart.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig
from sae_lens.config import HfDataset
from typing_extensions import override

from saelens_matryoshka.evaluation.tokens import special_token_ids
from saelens_matryoshka.seams import token_sequences
from saelens_matryoshka.sites import Site, probe
from saelens_matryoshka.store.reading import Reading
from saelens_matryoshka.store.resumable import ResumableStore

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookedRootModule


class PairedActivationsStore(ResumableStore):
    """Streams `[source | target]` rows, `[train_batch_size_tokens, d_in + d_out]`.

    Built with `paired_store`. The source is multiplied by the site's gain, if it has one, before it is
    stored.
    """

    reading: Reading

    @override
    @torch.no_grad()
    def get_activations(self, batch_tokens: torch.Tensor) -> torch.Tensor:
        """Pairs of a batch of tokens.

        Args:
            batch_tokens: `[prompts, context_size]`.

        Returns:
            `[prompts, context_size after seqpos_slice, d_in + d_out]` on the store's device.
        """
        pair = self.reading(self.get_multi_hook_activations(batch_tokens))
        return pair.to(self.device, self.dtype)


def paired_store(
    model: HookedRootModule,
    cfg: LanguageModelSAERunnerConfig[Any],
    source: Site,
    override_dataset: HfDataset | None = None,
) -> PairedActivationsStore:
    """The paired store of a transcoder's runner config.

    Args:
        model: The language model.
        cfg: Runner config whose `sae` is a transcoder's.
        source: The hook to read and its gain.
        override_dataset: Used in place of `cfg.dataset_path`.
    """
    if cfg.use_cached_activations:
        raise ValueError(
            f"use_cached_activations=True: {cfg.cached_activations_path!r} is not a cache of "
            "saelens-matryoshka. SAELens's own caches hold one hook, and a transcoder needs pairs."
        )
    target_hook, sae = cfg.sae.hook_name_out, cfg.sae
    widths = {cfg.hook_name: sae.d_in, target_hook: sae.d_out}
    heads = {cfg.hook_name: cfg.hook_head_index}
    store = multi_hook_store(PairedActivationsStore, model, cfg, widths, override_dataset, heads)
    store.reading = Reading(source, target_hook)
    store.d_in = sae.d_in + sae.d_out  # the width of a row, which the stock methods reshape to
    return store


S = TypeVar("S", bound=ResumableStore)


def multi_hook_store(
    store_class: type[S],
    model: HookedRootModule,
    cfg: LanguageModelSAERunnerConfig[Any],
    widths: dict[str, int],
    override_dataset: HfDataset | None = None,
    head_indices: dict[str, int | None] | None = None,
) -> S:
    """A store of several hooks, with the settings of a runner config.

    Args:
        store_class: Whose.
        model: The language model.
        cfg: Says which text, and how it is read.
        widths: Of each hook, by name.
        override_dataset: Used in place of `cfg.dataset_path`.
        head_indices: Where a hook has heads, the one to read; else all, flattened.
    """
    device = torch.device(cfg.act_store_device or cfg.device)
    excluded = special_token_ids(model, cfg.exclude_special_tokens)
    store = store_class.from_config_multi_hook(
        model,
        dataset=override_dataset if override_dataset is not None else cfg.dataset_path,
        hook_names=list(widths),
        hook_d_ins=widths,
        hook_head_indices=head_indices,
        streaming=cfg.streaming,
        context_size=cfg.context_size,
        n_batches_in_buffer=cfg.n_batches_in_buffer,
        total_training_tokens=cfg.training_tokens,
        store_batch_size_prompts=cfg.store_batch_size_prompts,
        train_batch_size_tokens=cfg.train_batch_size_tokens,
        prepend_bos=cfg.prepend_bos,
        normalize_activations=cfg.sae.normalize_activations,
        device=device,
        dtype=cfg.dtype,
        model_kwargs=cfg.model_kwargs,
        autocast_lm=cfg.autocast_lm,
        dataset_trust_remote_code=cfg.dataset_trust_remote_code,
        seqpos_slice=cfg.seqpos_slice,
        exclude_special_tokens=None if excluded is None else excluded.to(device),
        disable_concat_sequences=cfg.disable_concat_sequences,
        sequence_separator_token=cfg.sequence_separator_token,
        activations_mixing_fraction=cfg.activations_mixing_fraction,
        use_chat_formatting=cfg.use_chat_formatting,
    )
    assert isinstance(store, store_class)
    return store


def require_enough_text(store: ActivationsStore, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse a dataset that cannot fill one batch of the language model without repeating itself.

    Raises:
        ValueError: fewer than `store_batch_size_prompts` sequences of `context_size` tokens.
    """
    if store.dataset is None:
        return
    needed = store.store_batch_size_prompts
    with contextlib.closing(token_sequences(store)) as sequences:
        found = sum(1 for _ in itertools.islice(sequences, needed))
    if found < needed:
        raise ValueError(
            f"dataset_path={cfg.dataset_path!r}: the dataset is too small. It gives {found} sequences of "
            f"context_size={cfg.context_size} tokens, and one batch of the language model takes "
            f"store_batch_size_prompts={needed}. Use more text, or lower one of the two."
        )


class HookProbe(NamedTuple):
    """What one short forward pass tells about a source and a target hook."""

    d_in: int
    """width of the source, heads flattened"""
    d_out: int
    """width of the target, heads flattened"""
    target_is_first: bool
    """the target is computed before the source"""
    same_tensor: bool
    """source and target hold the same values"""


def probe_hooks(
    model: HookedRootModule, hook_name: str, hook_name_out: str, head_index: int | None = None
) -> HookProbe:
    """Run two tokens through the model and look at both hooks, in the order they fire."""
    seen = probe(model, [hook_name, hook_name_out])
    order = list(seen)
    source, target = seen[hook_name], seen[hook_name_out]
    if head_index is not None:
        n_heads = source.shape[2] if source.dim() == 4 else 0
        if not 0 <= head_index < n_heads:
            what = f"{n_heads} heads, from 0" if n_heads else "no heads: leave it out"
            raise ValueError(f"hook_head_index={head_index}, but hook {hook_name!r} has {what}.")
        source = source[:, :, head_index]
    source, target = source.flatten(2), target.flatten(2)
    return HookProbe(
        d_in=source.shape[-1],
        d_out=target.shape[-1],
        target_is_first=order.index(hook_name_out) < order.index(hook_name),
        same_tensor=torch.equal(source, target),
    )


def warn_of_same_tensor(hook_name: str, hook_name_out: str) -> None:
    """Say that a transcoder would predict what it reads."""
    warnings.warn(
        f"hook_name={hook_name!r} and hook_name_out={hook_name_out!r} are the same tensor, so this "
        "transcoder is an autoencoder with a free encoder. For what a layer computes, take its "
        "resid_pre and its resid_post.",
        stacklevel=2,
    )
