"""Nested widths: parse them, validate them, and say which level a latent belongs to.

A Matryoshka dictionary of `d_sae` latents has cumulative widths w_1 < ... < w_L = d_sae; the prefix of
width w_l is made of the latents 0 .. w_l - 1. Papers and repositories write the same thing in two ways:

- cumulative widths, `[1152, 3456, 8064, 18432]`: strictly increasing, the last one is d_sae;
- group sizes, `[1152, 2304, 4608, 10368]`: how many latents each level adds, their sum is d_sae.

The two cannot be confused, because a list of positive numbers whose last entry *and* sum are both d_sae
has one entry, for which they mean the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch


def cumulative_widths(sizes: Sequence[int], d_sae: int) -> list[int]:
    """Cumulative widths of the nested levels, from cumulative widths or from group sizes.

        sm.cumulative_widths([64, 192, 768], d_sae=1024)  # [64, 256, 1024]

    Args:
        sizes: Strictly increasing cumulative widths whose last entry is d_sae, or group sizes whose sum
            is d_sae.
        d_sae: Number of latents of the whole dictionary.

    Returns:
        The cumulative widths, strictly increasing, the last one d_sae.

    Raises:
        ValueError: `sizes` is empty, has an entry that is not a positive integer, or is neither
            cumulative widths nor group sizes; the message prints both readings.
    """
    sizes, d_sae = plain_numbers(sizes), plain_numbers(d_sae)
    if isinstance(d_sae, bool) or not isinstance(d_sae, int):
        raise ValueError(f"d_sae={d_sae!r} must be an integer.")
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise ValueError(
            f"matryoshka_widths={sizes!r} must be a list of integers, the last one d_sae={d_sae}, e.g. "
            f"{_example(d_sae)}."
        )
    sizes = [plain_numbers(size) for size in sizes]
    if not sizes:
        raise ValueError(
            "matryoshka_widths is empty: give the cumulative widths of the levels, the last one "
            f"d_sae={d_sae}, e.g. {_example(d_sae)}; [{d_sae}] trains a single, plain level."
        )
    if any(isinstance(size, bool) or not isinstance(size, int) or size <= 0 for size in sizes):
        raise ValueError(f"matryoshka_widths={sizes}: every width must be a positive integer.")
    if sizes[-1] == d_sae and all(low < high for low, high in pairwise(sizes)):
        return sizes
    if sum(sizes) == d_sae:
        return list(accumulate(sizes))
    raise ValueError(
        f"matryoshka_widths={sizes} fits d_sae={d_sae} in neither reading.\n"
        f"  As cumulative widths: {_cumulative_fault(sizes, d_sae)}.\n"
        f"  As group sizes: they add up to {sum(sizes)}, not to d_sae={d_sae}.\n"
        f"Give strictly increasing widths that end in d_sae, e.g. {_example(d_sae)}, or group sizes "
        "that add up to d_sae."
    )


def plain_numbers(value: Any) -> Any:
    """Numbers, arrays and tensors of numpy and torch as Python's numbers and lists; all else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def latent_levels(widths: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """The level each latent belongs to: the index of the narrowest prefix that contains it.

    Args:
        widths: Cumulative widths, as `cumulative_widths` returns them.
        device: Where to put the result.

    Returns:
        Integer tensor `[d_sae]` with values 0 .. len(widths) - 1, non-decreasing.
    """
    bounds = torch.tensor(list(widths), device=device)
    return torch.bucketize(torch.arange(widths[-1], device=device), bounds, right=True)


def _cumulative_fault(sizes: list[int], d_sae: int) -> str:
    for low, high in pairwise(sizes):
        if low >= high:
            return f"they must increase strictly, but {low} is followed by {high}"
    return f"they must end in d_sae={d_sae}, but end in {sizes[-1]}"


def _example(d_sae: int) -> list[int]:
    return sorted({max(1, d_sae // 16), max(1, d_sae // 4), d_sae})
