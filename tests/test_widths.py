from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saelens_matryoshka as sm
from saelens_matryoshka.widths import latent_levels


def test_cumulative_widths_are_kept() -> None:
    assert sm.cumulative_widths([1152, 3456, 8064, 18432], 18432) == [1152, 3456, 8064, 18432]


def test_group_sizes_become_cumulative_widths() -> None:
    assert sm.cumulative_widths([1152, 2304, 4608, 10368], 18432) == [1152, 3456, 8064, 18432]


def test_equal_group_sizes_become_cumulative_widths() -> None:
    assert sm.cumulative_widths([4, 4, 8], 16) == [4, 8, 16]


def test_one_width_is_a_plain_dictionary() -> None:
    assert sm.cumulative_widths([64], 64) == [64]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_both_readings_give_the_same_levels(sizes: list[int]) -> None:
    cumulative = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    d_sae = cumulative[-1]
    assert sm.cumulative_widths(cumulative, d_sae) == cumulative
    assert sm.cumulative_widths(sizes, d_sae) == cumulative


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([], "empty"),
        ([4, 2, 16], "4 is followed by 2"),
        ([4, 4, 16], "4 is followed by 4"),
        ([4, 8], "must end in d_sae=16, but end in 8"),
        ([4, 8], "add up to 12"),
        ([0, 16], "positive integer"),
        ([-4, 20], "positive integer"),
        ([4.5, 16], "positive integer"),
        ([True, 16], "positive integer"),
        ([4, 32], "end in 32"),
    ],
)
def test_bad_widths_are_told_in_both_readings(sizes: list[int], says: str) -> None:
    with pytest.raises(ValueError, match="matryoshka_widths") as error:
        sm.cumulative_widths(sizes, 16)
    assert says in str(error.value)


def test_level_of_each_latent() -> None:
    assert latent_levels([2, 3, 6]).tolist() == [0, 0, 1, 2, 2, 2]
    assert latent_levels([4]).dtype == torch.int64


@pytest.mark.parametrize(
    "sizes", [2 ** np.arange(3, 6), torch.tensor([8, 16, 32]), [torch.tensor(8), np.int64(16), 32]]
)
def test_integers_of_numpy_and_torch_are_integers(sizes: Any) -> None:
    widths = sm.cumulative_widths(sizes, 32)
    assert widths == [8, 16, 32]
    assert all(type(width) is int for width in widths)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (torch.tensor(32), "=32 must be a list of integers"),
        (torch.tensor([8.0, 32.0]), r"=\[8.0, 32.0\]: every width must be a positive integer"),
        (np.array([[8, 32]]), r"=\[\[8, 32\]\]: every width must be a positive integer"),
    ],
)
def test_arrays_that_are_no_list_of_integers_are_refused(sizes: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"matryoshka_widths{says}"):
        sm.cumulative_widths(sizes, 32)
