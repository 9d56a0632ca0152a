"""Every process reads its share, together they read everything, and none trains on what was held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import ActivationsStore
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.parallel.data import share_data
from saelens_matryoshka.seams import token_sequences
from tests.helpers import runner_config


def numbered(n: int) -> datasets.Dataset:
    """Documents of 32 tokens, each of which is its number."""
    return datasets.Dataset.from_dict({"input_ids": [[i] * 32 for i in range(n)]})


def share_of(
    model: HookedTransformer, dataset: Any, rank: int, size: int, **overrides: Any
) -> ActivationsStore:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    settings = {"n_eval_batches": 1, "eval_batch_size_prompts": 3, "train_batch_size_tokens": 96}
    cfg = runner_config(sae, **settings | overrides)
    store = ActivationsStore.from_config(model, cfg, dataset)
    share_data(store, rank, size)
    return store


def documents_of(store: ActivationsStore) -> list[int]:
    return [int(tokens[0]) for tokens in token_sequences(store)]


@pytest.mark.parametrize(("n_shards", "size"), [(None, 2), (None, 3), (4, 2), (3, 2), (1, 4)])
def test_processes_divide_the_documents_that_are_not_held_out(
    tiny_model: HookedTransformer, n_shards: int | None, size: int
) -> None:
    dataset: Any = numbered(44)
    if n_shards is not None:
        dataset = dataset.to_iterable_dataset(num_shards=n_shards)
    shares = [documents_of(share_of(tiny_model, dataset, rank, size)) for rank in range(size)]
    read = [document for share in shares for document in share]
    assert len(set(read)) == len(read)
    assert min(read) >= 3  # the first three are held out
    by_files = n_shards is not None and n_shards % size == 0
    assert len(read) >= (41 - 3 * size if by_files else 41)
    assert max(map(len, shares)) - min(map(len, shares)) <= (3 if by_files else 1)


def test_a_process_gives_its_part_of_the_batch_and_starts_its_share_again(
    tiny_model: HookedTransformer,
) -> None:
    store = share_of(tiny_model, numbered(13), 1, 2)  # 5 documents of 32 rows
    for _ in range(20):
        assert next(store).shape == (48, 128)


@pytest.mark.parametrize("size_after", [1, 2, 3])
def test_any_number_of_processes_goes_on_where_others_have_stopped(
    tiny_model: HookedTransformer, size_after: int, tmp_path: Path
) -> None:
    store = share_of(tiny_model, numbered(103), 0, 2)
    for _ in range(3):
        next(store)
    store.save_to_checkpoint(tmp_path)
    n_begun = 2 * (store.n_dataset_processed + 1)
    assert n_begun > 10
    begin = []
    for rank in range(size_after):
        other = share_of(tiny_model, numbered(103), rank, size_after)
        other.load_from_checkpoint(tmp_path)
        begin.append(int(next(other.iterable_sequences)[0]))
    # behind those, and the three held out
    assert sorted(begin) == list(range(3 + n_begun, 3 + n_begun + size_after))


def test_a_batch_that_cannot_be_divided_is_refused(tiny_model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match=r"train_batch_size_tokens=128 .* among 3. Take .* 129"):
        share_of(tiny_model, numbered(40), 0, 3, train_batch_size_tokens=128)


def test_fewer_documents_than_processes_are_refused(tiny_model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match="5 documents, fewer than there are processes"):
        share_of(tiny_model, numbered(8), 0, 8)


def test_shares_are_the_same_in_every_epoch(tiny_model: HookedTransformer) -> None:
    store = share_of(tiny_model, numbered(20), 1, 2)
    assert documents_of(store) == documents_of(store)
    assert torch.equal(next(store.iterable_sequences)[:1], torch.tensor([4]))
