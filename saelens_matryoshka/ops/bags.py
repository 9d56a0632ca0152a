"""Sums over bags of entries, which are a sparse matrix times a dense one, in the form that is fastest, and
the products of rows that are their gradients.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F

# Values gathered at a time where products of entries have no kernel of their own.
GATHERED_VALUES = 1 << 25


def bag_sums(
    index: torch.Tensor,
    table: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scattered: bool = False,
) -> torch.Tensor:
    """For each bag, the sum over its entries e of factors[e] · table[index[e]].

    Args:
        index: `[n]`, the entries of a bag next to each other.
        table: `[m, d]`
        offsets: `[n_bags + 1]`, where the entries of each bag begin, and n.
        factors: `[n]`
        out: `[n_bags, d]`, to write to and return, where `takes_memory` and the bags are not scattered.
        scattered: Whether a bag's rows lie all over the table, as in decoding. Changes the speed alone.

    Returns:
        `[n_bags, d]`
    """
    factors = factors.to(table.dtype)
    if not takes_memory(table) or (scattered and not _product_is_fast_if_scattered(table.dtype)):
        return F.embedding_bag(
            index, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True
        )
    if out is None:
        out = table.new_empty(len(offsets) - 1, table.shape[1])
    sparse = torch.sparse_csr_tensor(offsets, index, factors, (len(out), len(table)), check_invariants=False)
    with torch.autocast("cpu", enabled=False):  # which would round the operands
        return torch.addmm(out, sparse, table, beta=0, out=out)


def row_dots(
    left: torch.Tensor, left_index: torch.Tensor, right: torch.Tensor, right_index: torch.Tensor
) -> torch.Tensor:
    """For each entry e, left[left_index[e]] · right[right_index[e]].

    Each is computed by itself, to the same bits whatever the others are. Memory is read the faster, the
    fewer rows neighbouring entries are of.

    Args:
        left: `[m, d]`
        left_index: `[n]`
        right: `[m', d]`
        right_index: `[n]`

    Returns:
        `[n]`
    """
    if left.is_cuda and left.dtype == torch.bfloat16:  # which the kernel does not take in every torch
        chunk = max(1, GATHERED_VALUES // left.shape[1])
        pairs = zip(left_index.split(chunk), right_index.split(chunk), strict=True)
        products = [torch.bmm(left[i][:, None], right[j][:, :, None]) for i, j in pairs]
        return torch.cat(products).view(-1)
    # the factors' gradient of a sum over bags, to which it is all the same where the bags begin
    anywhere = left_index.new_zeros(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        right, left, left_index, anywhere, right_index, 0, -1
    )


def gathered_dtype(table: torch.Tensor) -> torch.dtype:
    """In which dtype to read the rows of a float32 table: on a GPU under autocast to bfloat16, in that.

    A dense product would round its operands just so. Bags take as long as their bytes take to arrive, and are
    added up in float32 either way.
    """
    device = table.device.type
    if device == "cpu" or table.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return table.dtype
    autocast = torch.get_autocast_dtype(device)
    return autocast if autocast == torch.bfloat16 else table.dtype  # gradients underflow in float16


def takes_memory(table: torch.Tensor) -> bool:
    """Whether `bag_sums` over this table is a product, which writes to memory it is given."""
    return table.device.type == "cpu" and table.dtype in _product_dtypes()


def _product_is_fast_if_scattered(dtype: torch.dtype) -> bool:
    """Whether a product reads rows from all over a table as fast as `embedding_bag` does.

    On a CPU without AVX-512 `embedding_bag`, which asks for the next rows ahead, takes a third of the time.
    It has no such kernel for float64.
    """
    return dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _product_dtypes() -> tuple[torch.dtype, ...]:
    """In which a product of sparse rows is the faster form on a CPU: none where torch has no MKL for it."""
    if not torch.backends.mkl.is_available():
        return ()
    with warnings.catch_warnings():  # torch says once per process that such tensors are in beta state
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)
    return (torch.float32, torch.float64)
