"""Every process reads its share; what some leave, others take over, and no token is lost or read twice."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from saelens_matryoshka.parallel.data import share_data
from saelens_matryoshka.seams import token_sequences
from saelens_matryoshka.store.resumable import ResumableStore
from saelens_matryoshka.store.state import state_file
from tests.fake_model import FakeModel

CONTEXT, PROMPTS, N_TOKENS = 8, 2, 60 * 24
KINDS = ["map text", "map tokens", "stream text", "files text", "files tokens", "shuffled tokens"]


class NumberModel(FakeModel):
    """Text is numbers, which are its tokens; the first activation of a token is its number."""

    def to_tokens(self, text: str, **_: Any) -> torch.Tensor:
        return torch.tensor([[int(number) for number in text.split()]], dtype=torch.long)


def dataset_of(kind: str) -> Any:
    """All numbers up to N_TOKENS, once each, in 60 or more documents."""
    form, content = kind.split()
    numbers = list(range(N_TOKENS))
    if content == "tokens":
        rows = [numbers[i : i + CONTEXT] for i in range(0, N_TOKENS, CONTEXT)]
        dataset = datasets.Dataset.from_dict({"input_ids": rows})
    else:
        ends = [0, *sorted(random.Random(0).sample(range(1, N_TOKENS), 59)), N_TOKENS]
        parts = [numbers[a:b] for a, b in itertools.pairwise(ends)]
        dataset = datasets.Dataset.from_dict({"text": [" ".join(map(str, part)) for part in parts]})
    if form == "map":
        return dataset
    stream = dataset.to_iterable_dataset(num_shards=12 if form == "files" else 1)
    return stream.shuffle(seed=0, buffer_size=7) if form == "shuffled" else stream


def store_of(dataset: Any, rank: int, size: int, **overrides: Any) -> ResumableStore:
    settings: dict[str, Any] = {
        "model": NumberModel(),
        "dataset": dataset,
        "streaming": False,
        "hook_name": "hook_source",
        "hook_head_index": None,
        "context_size": CONTEXT,
        "d_in": 2,
        "n_batches_in_buffer": 6,
        "total_training_tokens": 10,
        "store_batch_size_prompts": PROMPTS,
        "train_batch_size_tokens": 12,
        "prepend_bos": False,
        "sequence_separator_token": None,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    store = ResumableStore(**{**settings, **overrides})
    share_data(store, rank, size)
    return store


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All samples in the training dataset")
        warnings.filterwarnings("ignore", "The training dataset contains fewer|Dataset is not tokenized")
        yield


class Job:
    """The stores of some processes, and the tokens that they have served."""

    def __init__(self, kind: Any, size: int, **overrides: Any) -> None:
        self.kind, self.overrides, self.served = kind, overrides, Counter[int]()
        read = [dataset_of(kind) if isinstance(kind, str) else kind for _ in range(size)]
        self.stores = [store_of(dataset, rank, size, **overrides) for rank, dataset in enumerate(read)]

    def serve(self, n_batches: int) -> torch.Tensor:
        batches = torch.stack([torch.stack([next(s) for _ in range(n_batches)]) for s in self.stores])
        self.served.update(numbers_in(batches))
        return batches

    def save(self, folder: Path) -> None:
        for rank, store in enumerate(self.stores):
            state_file(folder, rank).write_bytes(store.state().to_bytes())

    def resumed(self, folder: Path, size: int) -> Job:
        """As many as `size` that go on."""
        job = Job(self.kind, size, **self.overrides)
        job.served = self.served.copy()
        for store in job.stores:
            store.load_from_checkpoint(folder)
        return job

    def waiting(self) -> Counter[int]:
        """Tokens that wait where stores were resumed: in buffers, rests of documents, documents not begun."""
        found = Counter[int]()
        for store in self.stores:
            state = store.state()
            for rows in (state.rows, state.serving):
                found.update([] if rows is None else numbers_in(rows))
            for rest in state.position.rests:
                found.update(rest.tolist())
            for row in store.iterable_sequences._documents:
                document = row[store.tokens_column]
                found.update(map(int, document.split() if isinstance(document, str) else document))
        return found


def numbers_in(rows: torch.Tensor) -> list[int]:
    return rows[..., 0].long().flatten().tolist()


ALL_ONCE = Counter(range(N_TOKENS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (1, 2), (2, 1), (4, 2), (2, 4), (3, 2, 4)], ids=str)
def test_any_number_of_processes_takes_over_what_others_have_left(
    kind: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    job = Job(kind, sizes[0])
    for size in sizes[1:]:
        job.serve(4)
        job.save(tmp_path)
        job = job.resumed(tmp_path, size)
    job.serve(2)
    job.save(tmp_path)
    assert job.served + job.resumed(tmp_path, sizes[-1]).waiting() == ALL_ONCE


@pytest.mark.parametrize("form", ["map", "stream"])
def test_when_all_documents_are_begun_their_rests_are_left(form: str, tmp_path: Path) -> None:
    parts = torch.arange(N_TOKENS).view(4, -1).tolist()
    dataset: Any = datasets.Dataset.from_dict({"text": [" ".join(map(str, part)) for part in parts]})
    dataset = dataset if form == "map" else dataset.to_iterable_dataset()
    job = Job(dataset, 2)
    while any(store.state().position.n_documents < 2 for store in job.stores):
        job.serve(1)
    job.save(tmp_path)
    resumed = job.resumed(tmp_path, 3)
    assert job.served + resumed.waiting() == ALL_ONCE
    for store in resumed.stores:  # and then the next epoch begins
        while store.state().position.epoch == 0:
            next(store)


def take(store: ResumableStore, n: int) -> torch.Tensor:
    return torch.stack([next(store) for _ in range(n)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [2, 3])
@pytest.mark.parametrize("n_served", [0, 2, 40])
def test_as_many_processes_go_on_with_the_next_batch(
    kind: str, before: int, n_served: int, tmp_path: Path
) -> None:
    job = Job(kind, before)
    job.serve(3)
    job.save(tmp_path)
    first, expected = tmp_path / "first", []
    first.mkdir()
    for rank, store in enumerate(job.resumed(tmp_path, 2).stores):
        if n_served:  # 40: into the next epoch
            take(store, n_served)
        state_file(first, rank).write_bytes(store.state().to_bytes())
        expected.append(take(store, 60))
    for store, batches in zip(job.resumed(first, 2).stores, expected, strict=True):
        store.load_from_checkpoint(first)  # its random state too
        assert torch.equal(take(store, 60), batches)


def test_a_process_that_has_begun_its_share_again_begins_it_once_more(tmp_path: Path) -> None:
    job = Job("map tokens", 2)
    slow, fast = job.stores
    while fast.state().position.epoch == 0:
        job.served.update(numbers_in(next(fast)))
    job.served.update(numbers_in(next(slow)))
    job.save(tmp_path)
    resumed = job.resumed(tmp_path, 3)
    seen = resumed.served + resumed.waiting()
    assert set(seen) == set(ALL_ONCE)
    of_slow = {int(n) for tokens in token_sequences(slow) for n in tokens}
    assert all(seen[number] == 1 for number in of_slow)
    assert {store.state().position.epoch for store in resumed.stores} == {0}


@pytest.mark.parametrize("kind", ["map text", "stream text", "files tokens"])
def test_the_next_epoch_is_divided_as_if_nothing_had_happened(kind: str, tmp_path: Path) -> None:
    job = Job(kind, 3)
    job.serve(3)
    job.save(tmp_path)
    for store, fresh in zip(job.resumed(tmp_path, 2).stores, Job(kind, 2).stores, strict=True):
        while store.iterable_sequences.position().epoch == 0:
            next(store)
        sequences = [tokens.tolist() for tokens in token_sequences(store)]
        assert sequences == [tokens.tolist() for tokens in token_sequences(fresh)]


@pytest.mark.parametrize("kind", ["map text", "stream text"])
def test_another_dataset_is_not_taken_over(kind: str, tmp_path: Path) -> None:
    job = Job(kind, 2)
    job.serve(4)
    job.save(tmp_path)
    texts = [row["text"] + " 7" for row in dataset_of("map text")]
    changed: Any = datasets.Dataset.from_dict({"text": texts})
    store = store_of(changed.to_iterable_dataset() if "stream" in kind else changed, 0, 3)
    with pytest.raises(ValueError, match="The dataset is not the one this run was started with"):  # noqa: PT012
        store.load_from_checkpoint(tmp_path)
        take(store, 20)


def test_without_mixing_what_waited_longest_is_served_first(tmp_path: Path) -> None:
    job = Job("map tokens", 2, activations_mixing_fraction=0.0)
    job.serve(1)
    job.save(tmp_path)
    (store,) = job.resumed(tmp_path, 1).stores
    waited = numbers_in(
        torch.cat([s.serving for other in job.stores if (s := other.state()).serving is not None])
    )
    assert numbers_in(take(store, 3)) == waited[:36]


def test_saelens_s_own_cached_activations_go_on_at_about_the_same_place(tmp_path: Path) -> None:
    rows = torch.arange(80 * CONTEXT * 2).view(80, CONTEXT, 2).float()
    shape = datasets.Array2D(shape=(CONTEXT, 2), dtype="float32")
    cache = datasets.Dataset.from_dict(
        {"hook_source": rows.numpy()}, features=datasets.Features({"hook_source": shape})
    )
    cache.save_to_disk(tmp_path / "cache")
    settings = {"cached_activations_path": str(tmp_path / "cache")}
    stores = [store_of(None, rank, 2, **settings) for rank in range(2)]
    for rank, store in enumerate(stores):
        take(store, 3)
        state_file(tmp_path, rank).write_bytes(store.state().to_bytes())
    n_read = sum(store.current_row_idx for store in stores)
    expected = take(stores[1], 9)
    resumed = store_of(None, 1, 2, **settings)
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(take(resumed, 9), expected)
    alone = store_of(None, 0, 1, **settings)
    with pytest.warns(UserWarning, match="about the same place"):
        alone.load_from_checkpoint(tmp_path)
    assert alone.current_row_idx == n_read
