"""Batches are shuffled, complete, the same again for the same seed, and continued from one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from saelens_matryoshka.cache import CacheError, open_cache
from tests.cache.helpers import SOURCE, TARGET


def _batches(folder: Path, size: int = 256, **kwargs: Any) -> Any:
    settings = {"seed": 0, "dtype": torch.float32, **kwargs}
    return open_cache(folder).batches([SOURCE, TARGET], size, **settings)


def test_every_row_comes_once_in_an_epoch(cache_folder: Path) -> None:
    batches = _batches(cache_folder)
    data = datasets.load_from_disk(str(cache_folder))["train"].with_format("torch")
    pairs = torch.cat([data[SOURCE][:], data[TARGET][:]], dim=1)
    for _ in range(2):
        epoch = [next(batches) for _ in range(2048 // 256)]
        seen = torch.cat([torch.cat([rows[SOURCE], rows[TARGET]], dim=1) for rows in epoch])
        assert torch.equal(seen[seen[:, 0].argsort()], pairs[pairs[:, 0].argsort()])
        assert not torch.equal(seen, pairs)


def test_the_stream_is_a_function_of_the_seed(cache_folder: Path) -> None:
    one, same, other = (_batches(cache_folder, seed=seed) for seed in (3, 3, 4))
    streams = [torch.cat([next(batches)[SOURCE] for _ in range(12)]) for batches in (one, same, other)]
    assert torch.equal(streams[0], streams[1])
    assert not torch.equal(streams[0], streams[2])
    assert not torch.equal(streams[0][:2048][:1024], streams[0][2048:])  # the second epoch is another order


def test_a_stream_is_continued_from_its_position(cache_folder: Path) -> None:
    straight, resumed = _batches(cache_folder), _batches(cache_folder)
    for _ in range(11):  # into the second epoch
        next(straight)
    resumed.position = straight.position
    for _ in range(3):
        assert torch.equal(next(straight)[TARGET], next(resumed)[TARGET])


@pytest.mark.parametrize("size", [1, 7, 100, 2048])
def test_any_batch_size_is_served(size: int, cache_folder: Path) -> None:
    batches = _batches(cache_folder, size)
    assert all(next(batches)[SOURCE].shape == (size, 128) for _ in range(4))


def test_a_batch_larger_than_the_cache_is_refused(cache_folder: Path) -> None:
    with pytest.raises(CacheError, match="2,048 tokens.*train_batch_size_tokens=4096"):
        _batches(cache_folder, 4096)


def test_the_first_rows_of_a_batch_are_from_all_over_the_cache(cache_folder: Path) -> None:
    """A threshold is calibrated on the first rows of many batches."""
    cache = open_cache(cache_folder)
    firsts = next(cache.batches([SOURCE], 1024, seed=0, dtype=torch.float32))[SOURCE][:8]
    files = [rows.values for rows in cache.rows("train", SOURCE)]
    origin = [next(i for i, rows in enumerate(files) if (rows == row).all(dim=1).any()) for row in firsts]
    assert len(set(origin)) > 1


def test_reading_does_not_hand_out_the_files_themselves(cache_folder: Path) -> None:
    """They are mapped read-only: writing into them would end the process."""
    cache = open_cache(cache_folder)
    next(cache.batches([SOURCE], 1, seed=0, dtype=torch.float32))[SOURCE].zero_()
    next(cache.held_out([SOURCE], 8, dtype=torch.float32))[SOURCE].zero_()
