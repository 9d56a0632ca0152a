"""Rows of activations as columns of an Arrow table, and back.

| dtype | column of a hook of width d | bytes a row |
|---|---|---|
| float32 | `fixed_size_list<float>[d]` | 4 d |
| bfloat16 | `fixed_size_list<int16>[d]`, the bits: Arrow has no bfloat16 | 2 d |
| int8 | `fixed_size_list<int8>[d]` q, and a column `HOOK.scale`: x ≈ scale · q | d + 4 |

The scale of a token is its largest magnitude / 127.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
import torch
from datasets import Features, Sequence, Value

DTYPES = ("float32", "bfloat16", "int8")
TOKEN = "token"
"""The column of token ids."""

_ARROW = {"float32": "float32", "bfloat16": "int16", "int8": "int8"}
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class Rows(NamedTuple):
    """Encoded rows of one hook."""

    values: torch.Tensor
    """`[n, d]`: float32, int16 (the bits of bfloat16) or int8"""
    scale: torch.Tensor | None
    """`[n]` float32, of int8 only"""


def scale_column(hook: str) -> str:
    """The column of a hook's scales."""
    return f"{hook}.scale"


def features(widths: Mapping[str, int], dtype: str) -> Features:
    """The dataset's columns: token ids, and the hooks."""
    columns: dict[str, object] = {TOKEN: Value("int32")}
    for hook, width in widths.items():
        columns[hook] = Sequence(Value(_ARROW[dtype]), length=width)
        if dtype == "int8":
            columns[scale_column(hook)] = Value("float32")
    return Features(columns)


def row_bytes(widths: Mapping[str, int], dtype: str) -> int:
    """Bytes of one token."""
    return 4 + sum(_BYTES[dtype] * width + 4 * (dtype == "int8") for width in widths.values())


def encode(rows: torch.Tensor, dtype: str) -> Rows:
    """Encode activations `[n, d]`, on their device."""
    if dtype == "float32":
        return Rows(rows.float(), None)
    if dtype == "bfloat16":
        return Rows(rows.to(torch.bfloat16).view(torch.int16), None)
    wide = rows.float()
    scale = wide.abs().amax(dim=-1) / 127
    steps = wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return Rows(steps.round().clamp(-127, 127).to(torch.int8), scale)


def decode(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """The activations `[n, d]`, on the rows' device."""
    values, scale = rows
    if scale is not None:
        return (values * scale[:, None]).to(dtype)
    return (values.view(torch.bfloat16) if values.dtype == torch.int16 else values).to(dtype)


def to_arrow(hooks: Mapping[str, Rows], tokens: torch.Tensor, dtype: str) -> pa.Table:
    """A table of encoded rows and their token ids `[n]`."""
    columns: dict[str, pa.Array] = {TOKEN: pa.array(tokens.to(torch.int32).cpu().numpy())}
    for hook, (values, scale) in hooks.items():
        flat = pa.array(values.cpu().contiguous().view(-1).numpy())
        columns[hook] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        if scale is not None:
            columns[scale_column(hook)] = pa.array(scale.cpu().numpy())
    schema = features({hook: rows.values.shape[1] for hook, rows in hooks.items()}, dtype).arrow_schema
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def from_arrow(table: pa.Table, hook: str) -> Rows:
    """The rows of one hook, views of the table's memory (of a file mapped into memory: nothing is read)."""
    values = _only_chunk(table, hook)
    scale = _only_chunk(table, scale_column(hook)) if scale_column(hook) in table.column_names else None
    return Rows(
        _view(values.flatten()).view(-1, values.type.list_size), None if scale is None else _view(scale)
    )


def _only_chunk(table: pa.Table, column: str) -> pa.Array:
    (chunk,) = table.column(column).chunks  # a file is written as one record batch
    return chunk


def _view(array: pa.Array) -> torch.Tensor:
    with warnings.catch_warnings():
        # a mapped file is not writable, and nothing here writes to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array.to_numpy(zero_copy_only=True))
