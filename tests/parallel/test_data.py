"""Every process reads its share, together they read everything, and none trains on what was held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import save_file
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.cache import CachedModel, open_cache
from saelens_matryoshka.cache.store import cached_store
from saelens_matryoshka.parallel.data import share_data
from saelens_matryoshka.seams import token_sequences
from saelens_matryoshka.store.resumable import ResumableStore
from saelens_matryoshka.store.state import state_file
from tests.helpers import runner_config, transcoder_config


def numbered(n: int) -> datasets.Dataset:
    """Documents of 32 tokens, each of which is its number."""
    return datasets.Dataset.from_dict({"input_ids": [[i] * 32 for i in range(n)]})


def share_of(
    model: HookedTransformer, dataset: Any, rank: int, size: int, **overrides: Any
) -> ResumableStore:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    settings = {"n_eval_batches": 1, "eval_batch_size_prompts": 3, "train_batch_size_tokens": 96}
    cfg = runner_config(sae, **settings | overrides)
    store = ResumableStore.from_config(model, cfg, dataset)
    assert isinstance(store, ResumableStore)
    share_data(store, rank, size)
    return store


def documents_of(store: ResumableStore) -> list[int]:
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
def test_a_checkpoint_with_only_a_count_of_documents_is_continued_at_about_the_same_place(
    tiny_model: HookedTransformer, size_after: int, tmp_path: Path
) -> None:
    n_begun = 18  # by all processes together, whose number is not known
    save_file({"n_dataset_processed": torch.tensor(n_begun - 1)}, state_file(tmp_path, 0))
    begin = []
    for rank in range(size_after):
        store = share_of(tiny_model, numbered(103), rank, size_after)
        with pytest.warns(UserWarning, match="about the same place"):
            store.load_from_checkpoint(tmp_path)
        begin.append(int(next(store.iterable_sequences)[0]))
    # behind those, and the three held out
    assert sorted(begin) == list(range(3 + n_begun, 3 + n_begun + size_after))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [96, 256])  # fewer rows than a block for each process, and more
def test_processes_divide_the_batches_of_a_cache(
    size: int, batch_size: int, cache_folder: Path, tmp_path: Path
) -> None:
    def store() -> Any:
        cache = {"use_cached_activations": True, "cached_activations_path": str(cache_folder)}
        cfg = runner_config(transcoder_config(), train_batch_size_tokens=batch_size, **cache)
        return cached_store(cfg, CachedModel(open_cache(cache_folder)))

    whole, parts = store(), [store() for _ in range(size)]
    for rank, part in enumerate(parts):
        share_data(part, rank, size)
    for _ in range(3):
        assert torch.equal(torch.cat([next(part) for part in parts]), next(whole))
    parts[0].save_to_checkpoint(tmp_path)
    resumed = store()
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(next(resumed), next(whole))


def test_a_share_without_a_whole_sequence_is_refused(tiny_model: HookedTransformer) -> None:
    texts = [" a long story" * 100 if i % 2 == 0 else " short" for i in range(12)]
    with pytest.raises(ValueError, match="process 1 of 2 has too little text for one sequence"):
        share_of(tiny_model, datasets.Dataset.from_dict({"text": texts}), 1, 2, n_eval_batches=0)


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
