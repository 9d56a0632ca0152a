"""The store streams what SAELens's streams, and continues after a restart with the very next batch."""

from __future__ import annotations

import contextlib
import random
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import ActivationsStore
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.prefetch import PrefetchingIterator

from saelens_matryoshka.store.mixing import MixingBuffer
from saelens_matryoshka.store.resumable import PrefetchedBatches, ResumableStore
from tests.fake_model import FakeModel

CONTEXT = 16


class TextModel(FakeModel):
    """One token per character."""

    def to_tokens(self, text: str, **_: Any) -> torch.Tensor:
        return torch.tensor([[ord(character) % 50 for character in text]], dtype=torch.long)


def _texts(n: int = 60) -> list[str]:
    generator = random.Random(0)
    return [
        "".join(generator.choices("abcdefgh", k=generator.choice([0, 1, 5, 16, 17, 40, 90])))
        for _ in range(n)
    ]


def _tokens(n: int = 60, length: int = CONTEXT) -> list[list[int]]:
    return torch.randint(3, 50, (n, length), generator=torch.Generator().manual_seed(0)).tolist()


def _map_style(kind: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": _texts()} if kind == "text" else {"input_ids": _tokens()})


def _dataset(kind: str) -> Any:
    form, kind = kind.split(" ")
    dataset = _map_style(kind)
    if form == "map":
        return dataset
    stream = dataset.to_iterable_dataset(num_shards=7)
    return stream.shuffle(seed=0, buffer_size=11) if form == "shuffled" else stream


DATASETS = [f"{form} {kind}" for form in ("map", "streaming", "shuffled") for kind in ("text", "tokens")]


def _store(cls: type[ActivationsStore], dataset: Any, **overrides: Any) -> Any:
    values: dict[str, Any] = {
        "model": TextModel(),
        "dataset": dataset,
        "streaming": False,
        "hook_name": "hook_source",
        "hook_head_index": None,
        "context_size": CONTEXT,
        "d_in": 2,
        "n_batches_in_buffer": 6,
        "total_training_tokens": 10,
        "store_batch_size_prompts": 3,
        "train_batch_size_tokens": 20,
        "prepend_bos": True,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**{**values, **overrides})


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All samples in the training dataset")
        yield


def _take(batches: Iterator[torch.Tensor], n: int) -> torch.Tensor:
    return torch.stack([next(batches) for _ in range(n)])


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("cutting", ["", "no bos", "no concatenation", "no separator"])
def test_streams_the_same_batches_as_saelens_over_several_epochs(kind: str, cutting: str) -> None:
    overrides: dict[str, Any] = {
        "": {},
        "no bos": {"prepend_bos": False},
        "no concatenation": {"disable_concat_sequences": True},
        "no separator": {"sequence_separator_token": None},
    }[cutting]
    streams = []
    for cls in (ActivationsStore, ResumableStore):
        torch.manual_seed(0)
        streams.append(_take(_store(cls, _dataset(kind), **overrides), 120))
    assert torch.equal(*streams)


@given(
    data=st.data(),
    buffer_size=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    mix_fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_mixing_buffer_is_saelens_s(
    data: Any, buffer_size: int, batch_size: int, mix_fraction: float
) -> None:
    buffer_size = max(buffer_size, batch_size)
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=20))
    parts = torch.arange(sum(lengths)).split(lengths)
    torch.manual_seed(0)
    theirs = list(mixing_buffer(buffer_size, batch_size, iter(parts), mix_fraction))
    torch.manual_seed(0)
    source = ((part, index) for index, part in enumerate(parts))
    sizes: dict[str, Any] = {
        "buffer_size": buffer_size,
        "batch_size": batch_size,
        "mix_fraction": mix_fraction,
    }
    ours = list(MixingBuffer(source, start=-1, **sizes))
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_the_source_gave_is_not_kept_piece_by_piece() -> None:
    """Pieces among what a language model frees would keep that memory from being used again."""
    given: list[Any] = []

    def source() -> Iterator[tuple[torch.Tensor, int]]:
        while True:
            assert not any(piece() is not None for piece in given[:-1])
            piece = torch.zeros(10, 3)
            given.append(weakref.ref(piece.untyped_storage()))
            yield piece, 0
            del piece

    buffer = MixingBuffer(source(), buffer_size=45, batch_size=10, mix_fraction=0.5, start=0)
    _take(buffer, 8)
    assert len(given) > 8


@given(
    texts=st.lists(st.text("ab", max_size=30), min_size=1, max_size=12),
    size=st.integers(2, 12),
    prepend_bos=st.booleans(),
    separator=st.sampled_from(["bos", "eos", None, ord("a") % 50]),
)
@settings(max_examples=60, deadline=None)
def test_documents_are_cut_into_sequences_as_saelens_cuts_them(
    texts: list[str], size: int, prepend_bos: bool, separator: Any
) -> None:
    dataset = datasets.Dataset.from_dict({"text": texts})
    overrides = {"context_size": size, "prepend_bos": prepend_bos, "sequence_separator_token": separator}
    store = _store(ResumableStore, dataset, **overrides)
    ids = {"bos": 0, "eos": 1}
    theirs = concat_and_batch_sequences(
        (TextModel().to_tokens(text)[0] for text in texts),
        size,
        begin_batch_token_id=0 if prepend_bos else None,
        sequence_separator_token_id=ids.get(separator, separator),
    )
    assert [s.tolist() for s in store.sequences()] == [s.tolist() for s in theirs]


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("n_before", [0, 1, 2, 5, 17, 60])
@pytest.mark.parametrize("mix_fraction", [0.5, 0.0])
def test_continues_with_the_next_batch(kind: str, n_before: int, mix_fraction: float, tmp_path: Path) -> None:
    overrides = {"activations_mixing_fraction": mix_fraction, "exclude_special_tokens": torch.tensor([0])}
    torch.manual_seed(0)
    store = _store(ResumableStore, _dataset(kind), **overrides)
    if n_before:
        _take(store, n_before)
    store.save_to_checkpoint(tmp_path)
    expected, processed = _take(store, 60), store.n_dataset_processed

    torch.manual_seed(99)
    resumed = _store(ResumableStore, _dataset(kind), **overrides)
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(_take(resumed, 60), expected)
    assert resumed.n_dataset_processed == processed


def test_continues_a_continued_stream(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = _take(_store(ResumableStore, _dataset("streaming text")), 60)
    torch.manual_seed(0)
    store, found = _store(ResumableStore, _dataset("streaming text")), []
    for _ in range(20):
        found.append(_take(store, 3))
        store.save_to_checkpoint(tmp_path)
        store = _store(ResumableStore, _dataset("streaming text"))
        store.load_from_checkpoint(tmp_path)
    assert torch.equal(torch.cat(found), expected)


def test_streaming_dataset_is_not_read_again_from_its_start(tmp_path: Path) -> None:
    read: list[int] = []

    def rows(shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            for row in _tokens(10):
                read.append(shard)
                yield {"input_ids": row}

    def dataset() -> Any:
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(8))})

    store = _store(ResumableStore, dataset())
    _take(store, 40)
    store.save_to_checkpoint(tmp_path)
    resumed = _store(ResumableStore, dataset())
    read.clear()
    resumed.load_from_checkpoint(tmp_path)
    _take(resumed, 10)
    assert read
    assert 0 not in read


@pytest.mark.parametrize("kind", ["map text", "streaming text"])
def test_another_dataset_is_refused(kind: str, tmp_path: Path) -> None:
    store = _store(ResumableStore, _dataset(kind))
    _take(store, 5)
    store.save_to_checkpoint(tmp_path)
    changed = datasets.Dataset.from_dict({"text": [text + "h" for text in _texts()]})
    other = changed if kind.startswith("map") else changed.to_iterable_dataset()
    resumed = _store(ResumableStore, other)
    resumed.load_from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="The dataset is not the one this run was started with"):
        _take(resumed, 20)


@pytest.mark.parametrize("queue", [1, 3])
def test_batches_that_wait_in_a_prefetcher_s_queue_are_saved(queue: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = _take(_store(ResumableStore, _dataset("map text")), 40)
    torch.manual_seed(0)
    found = []
    for start in range(4):
        store = _store(ResumableStore, _dataset("map text"))
        store.expect_prefetching(queue)
        prefetcher = PrefetchingIterator(iter(store), prefetch=queue)
        if start:  # as SAELens's runner does: the thread is running already
            store.load_from_checkpoint(tmp_path)
        batches = PrefetchedBatches(prefetcher, store)
        found.append(_take(batches, 10))
        store.save_to_checkpoint(tmp_path)
        prefetcher.close()
    assert torch.equal(torch.cat(found), expected)


def test_an_error_in_the_data_leaves_a_state_to_continue_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = _take(_store(ResumableStore, _dataset("map text")), 40)
    torch.manual_seed(0)
    store = _store(ResumableStore, _dataset("map text"))
    found, stock, n_calls = [], store.get_activations, 0

    def flaky(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 7:
            raise ConnectionError
        return stock(tokens)

    store.get_activations = flaky
    with contextlib.suppress(ConnectionError):
        while True:
            found.append(next(store))
    assert 0 < len(found) < 40
    store.save_to_checkpoint(tmp_path)
    resumed = _store(ResumableStore, _dataset("map text"))
    resumed.load_from_checkpoint(tmp_path)
    found += list(_take(resumed, 40 - len(found)))
    assert torch.equal(torch.stack(found), expected)


def test_random_states_are_restored(tmp_path: Path) -> None:
    store = _store(ResumableStore, _dataset("map tokens"))
    store.save_to_checkpoint(tmp_path)
    expected = random.random(), np.random.rand(), torch.rand(())
    store.load_from_checkpoint(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_a_file_of_saelens_s_own_store_is_taken_for_what_it_says(tmp_path: Path) -> None:
    theirs = _store(ActivationsStore, _dataset("map tokens"))
    _take(theirs, 5)
    theirs.save_to_checkpoint(tmp_path)
    ours = _store(ResumableStore, _dataset("map tokens"))
    with pytest.warns(UserWarning, match="written by SAELens's own store"):
        ours.load_from_checkpoint(tmp_path)
    assert ours.n_dataset_processed == theirs.n_dataset_processed


def test_cached_activations_are_continued(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, CONTEXT, 2, generator=generator)
    shape = datasets.Array2D(shape=(CONTEXT, 2), dtype="float32")
    cache = datasets.Dataset.from_dict(
        {"hook_source": rows.numpy()}, features=datasets.Features({"hook_source": shape})
    )
    cache.save_to_disk(tmp_path / "cache")
    settings = {"cached_activations_path": str(tmp_path / "cache")}
    store = _store(ResumableStore, None, **settings)
    _take(store, 9)
    store.save_to_checkpoint(tmp_path)
    expected = _take(store, 60)
    resumed = _store(ResumableStore, None, **settings)
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(_take(resumed, 60), expected)
