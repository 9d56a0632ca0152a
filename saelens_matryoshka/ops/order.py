"""Order: sorting, k-th largest values, places in a mask.

On a CPU numpy's sorting is several times as fast as torch's.
"""

from __future__ import annotations

import numpy as np
import torch


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest (from 1) along the last dimension, of `[*batch, m]` with m >= k: `[*batch, 1]`."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    place = values.shape[-1] - k
    partitioned = np.partition(values.detach().numpy(), place, axis=-1)
    return torch.from_numpy(partitioned[..., place, None].copy())


def stable_order(values: torch.Tensor, bound: int) -> torch.Tensor:
    """Where the values `[n]`, integers in [0, bound), are in increasing order, equal ones by index: `[n]`."""
    if values.device.type != "cpu":
        return torch.sort(values, stable=True).indices
    # numpy sorts 16 bits by radix: digit by digit, from the lowest up
    digits = values.numpy()
    order = np.argsort(digits.astype(np.uint16), kind="stable")
    for shift in range(16, max(bound - 1, 0).bit_length(), 16):
        order = order[np.argsort((digits[order] >> shift).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


def tile_order(rows: torch.Tensor, columns: torch.Tensor, n_columns: int, tile_rows: int) -> torch.Tensor:
    """The entries `[n]` of a matrix by blocks of so many rows, those of a block by column: `[n]`."""
    tiles = rows // tile_rows
    n_tiles = int(tiles[-1]) + 1 if len(tiles) else 0  # the rows are in increasing order
    return stable_order(tiles * n_columns + columns, n_tiles * n_columns)


def true_places(mask: torch.Tensor, n: int) -> torch.Tensor:
    """Where a mask `[m]` is true, which it is n times: `[n]`, increasing, without waiting for a GPU."""
    if mask.device.type == "cpu":
        return mask.nonzero().squeeze(1)
    # nonzero would count them, and nonzero_static has no CUDA kernel before torch 2.7
    place = torch.where(mask, mask.cumsum(0) - 1, n)  # of all that are false the one after the last
    index = torch.arange(len(mask), device=mask.device)
    return place.new_zeros(n + 1).scatter_(0, place, index)[:n]
