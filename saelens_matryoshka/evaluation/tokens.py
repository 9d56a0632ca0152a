"""The tokens an evaluation runs on, read the way the SAE's training data were."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from sae_lens import SAE, ActivationsStore
from sae_lens.config import HfDataset
from sae_lens.util import get_special_token_ids

from saelens_matryoshka.seams import token_device


def special_token_ids(model: Any, exclude: bool | list[int]) -> torch.Tensor | None:
    """The ids to leave out, None for none; True means the tokenizer's special tokens.

    Raises:
        ValueError: neither a boolean nor a list of ids.
    """
    is_list = isinstance(exclude, list | tuple) and all(isinstance(token, Integral) for token in exclude)
    if not (is_list or isinstance(exclude, bool)):
        raise ValueError(f"exclude_special_tokens={exclude!r} must be True, False or a list of token ids.")
    if exclude is True:
        tokenizer = getattr(model, "tokenizer", None)
        exclude = get_special_token_ids(tokenizer) if tokenizer is not None else []
    return torch.tensor(exclude, dtype=torch.long) if exclude else None


def is_excluded(tokens: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
    """Mask, of the tokens' shape and on their device, of those that `special_token_ids` leaves out."""
    if excluded is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return torch.isin(tokens, excluded.to(tokens.device))


def as_dataset(dataset: Any, field: str) -> HfDataset:
    """A dataset as it is, and a list of rows or of texts as one.

    Raises:
        ValueError: it is something else, or several splits; the message names the field.
    """
    if isinstance(dataset, list) and all(isinstance(row, str | dict) for row in dataset):
        return Dataset.from_list([{"text": row} if isinstance(row, str) else row for row in dataset])
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(f"{field} has the splits {', '.join(map(str, dataset))}: give one of them.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"{field} is a {type(dataset).__name__}, and must be a dataset of the datasets library, or a "
            "list of texts or of rows. Of a generator, IterableDataset.from_generator makes one."
        )
    return dataset


def token_batches(
    sae: SAE[Any],
    model: Any,
    dataset: HfDataset | list[Any] | str | torch.Tensor,
    n_tokens: int,
    context_size: int | None,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """Batches `[prompts, context_size]` on the model's device, together about `n_tokens` tokens.

    Raises:
        ValueError: a number is out of range, or the dataset holds no tokens of this language model.
    """
    require_count("n_tokens", n_tokens, 1)
    require_count("batch_size_prompts", batch_size, 1)
    device = token_device(model)
    if isinstance(dataset, torch.Tensor):
        _require_token_ids(dataset, model)
        require_context_size(dataset.shape[1], model)
        n_prompts = -(-n_tokens // dataset.shape[1])
        prompts = iter(dataset[:n_prompts].long())  # as labels, and as an index, no narrower integers will do
    else:
        store = _token_store(sae, model, dataset, context_size)
        n_prompts = -(-n_tokens // store.context_size)
        prompts = _prompts(store, n_prompts)
    batch = list(itertools.islice(prompts, batch_size))
    if not batch:
        raise ValueError("dataset: it holds no full prompt, so there is nothing to evaluate on.")
    while batch:
        yield torch.stack(batch).to(device)
        batch = list(itertools.islice(prompts, batch_size))


def require_count(name: str, value: object, least: int) -> None:
    """Check that a number of things is one.

    Raises:
        ValueError: it is not an integer, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} must be an integer.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _prompts(store: ActivationsStore, n_prompts: int) -> Iterator[torch.Tensor]:
    for _ in range(n_prompts):
        try:
            tokens = store.get_batch_tokens(1, raise_at_epoch_end=True)
        except StopIteration:
            return
        except (ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"dataset: a row cannot be read as {'tokens' if store.is_dataset_tokenized else 'text'} "
                f"(column {store.tokens_column!r}): {reason}"
            ) from None
        _require_token_ids(tokens, store.model)
        yield tokens[0]


def _require_token_ids(tokens: torch.Tensor, model: Any) -> None:
    is_integer = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.dim() != 2 or not is_integer or tokens.numel() == 0:
        raise ValueError(
            f"dataset: a {tokens.dtype} tensor of shape {list(tokens.shape)}; expected integer token ids "
            "[prompts, context_size], at least one."
        )
    d_vocab = getattr(getattr(model, "cfg", None), "d_vocab", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (isinstance(d_vocab, int) and high >= d_vocab):
        raise ValueError(
            f"dataset: it has token {low if low < 0 else high}, and this language model's ids are 0 to "
            f"{d_vocab - 1 if isinstance(d_vocab, int) else '...'}: it was tokenised for another model."
        )


def require_context_size(context_size: int, model: Any) -> None:
    """Check that prompts of so many tokens can be given to a language model.

    Raises:
        ValueError: it is no integer, less than 2, or more than the model takes.
    """
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None) or context_size
    if not isinstance(context_size, Integral):
        raise ValueError(f"context_size={context_size!r} must be an integer.")
    if not 2 <= context_size <= longest:
        raise ValueError(
            f"context_size={context_size} must be from 2 to {longest}, the longest this language model takes."
        )


def _token_store(
    sae: SAE[Any], model: Any, dataset: HfDataset | list[Any] | str, context_size: int | None
) -> ActivationsStore:
    metadata = copy.copy(sae.cfg.metadata)
    dataset = dataset if isinstance(dataset, str) else as_dataset(dataset, "dataset")
    context_size = metadata.context_size if context_size is None else context_size
    if context_size is None:
        raise ValueError(
            "context_size: this model's metadata do not say with how many tokens per prompt it was trained. "
            "Give context_size."
        )
    require_context_size(context_size, model)
    if metadata.prepend_bos is None:
        metadata.prepend_bos = True  # SAELens's default
    cfg = copy.copy(sae.cfg)
    cfg.metadata = metadata
    described: Any = SimpleNamespace(cfg=cfg)  # all that is read of an SAE
    try:
        store = ActivationsStore.from_sae(
            model,
            described,
            dataset,
            context_size=context_size,
            sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            total_tokens=0,
        )
    except StopIteration:
        raise ValueError("dataset: it is empty, so there is nothing to evaluate on.") from None
    except ValueError as error:
        if "column" not in str(error):
            raise
        raise ValueError(f"dataset: {error} Name one with rows of 'text'.") from None
    _require_text(store)
    return store


def _require_text(store: ActivationsStore) -> None:
    """Check the first row: a tokenizer takes a list for a batch of texts."""
    if store.is_dataset_tokenized or store.dataset is None:
        return
    first: Any = next(iter(store.dataset))
    text = first[store.tokens_column]
    if not isinstance(text, str):
        raise ValueError(
            f"dataset: a row cannot be read as text (column {store.tokens_column!r}): it holds "
            f"{'nothing' if text is None else f'a {type(text).__name__}'}."
        )
