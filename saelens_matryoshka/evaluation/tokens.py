"""The tokens an evaluation runs on, read the way the SAE's training data were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.config import HfDataset
from sae_lens.util import get_special_token_ids

from saelens_matryoshka.seams import token_device


def special_token_ids(model: Any, exclude: bool | list[int]) -> torch.Tensor | None:
    """The ids to leave out, None for none; True means the tokenizer's special tokens."""
    if exclude is True:
        tokenizer = getattr(model, "tokenizer", None)
        exclude = get_special_token_ids(tokenizer) if tokenizer is not None else []
    return torch.tensor(exclude, dtype=torch.long) if exclude else None


def token_batches(
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
