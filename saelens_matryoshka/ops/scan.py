"""The few entries of a large matrix that exceed a bound."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

# Bytes that a thread of a CPU looks at in one go: they and what is made of them stay in its cache.
_CACHED_BYTES = 1 << 20
# So many of them, or another thread, which torch's own disturb for a while, is not worth it.
_MIN_PARTS = 5


def entries_above(
    values: torch.Tensor, bounds: torch.Tensor, *, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find what is above a bound of its column.

    Args:
        values: `[rows, m]`, contiguous.
        bounds: `[m]`, of the same dtype.
        bias: `[m]`, added to the values first, in place.

    Returns:
        Flat indices `[n]`, increasing, and the values there `[n]`.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64, torch.int16):
        if bias is not None:
            values.add_(bias)
        index = (values > bounds).view(-1).nonzero().squeeze(1)
        return index, values.view(-1)[index]
    # A CPU's memory is what takes time. numpy compares, and passes over what is false, in less than half of
    # torch's time, and lets go of the interpreter meanwhile.
    table, limits = values.detach().numpy(), bounds.detach().numpy()
    addend = None if bias is None else bias.detach().numpy()
    width = table.shape[1]
    n_rows = max(1, _CACHED_BYTES // (width * table.itemsize))

    def scan(start: int) -> tuple[np.ndarray, np.ndarray]:
        block = table[start : start + n_rows]
        if addend is not None:
            block += addend
        index = np.flatnonzero(block > limits)
        return index + start * width, block.reshape(-1)[index]

    starts = range(0, len(table), n_rows)
    if len(starts) < _MIN_PARTS:
        found = [scan(start) for start in starts]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            found = list(threads.map(scan, starts))
    index, kept = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return torch.from_numpy(index), torch.from_numpy(kept)
