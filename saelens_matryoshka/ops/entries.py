"""The kept entries as a matrix, `[B, d_sae]` and all but empty, and its products with the weights.

Decoding is one, and so are the gradients of the decoder and, with the entries' own gradients, of the encoder.
There are two forms of them:

- `GatheredEntries` read a row of the other factor for each entry, so the work follows their number;
- `DenseEntries` multiply all of it, zeros included. A GPU's tensor cores do a few hundred multiplications in
  the time in which a value arrives, so they are the faster while the entries are not rarer than that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from saelens_matryoshka.ops.bags import bag_sums, gathered_dtype, row_dots, takes_memory
from saelens_matryoshka.ops.encoder import BLOCK_VALUES
from saelens_matryoshka.ops.levels import Levels
from saelens_matryoshka.ops.order import stable_order
from saelens_matryoshka.ops.selection import Selection

# Multiplications of bfloat16 matrices in the time in which memory delivers one value: by the data sheets 290
# for an H100, 206 for an H200, 160 for an A100, and of memory scattered reads get less. Not measured.
TENSOR_CORE_ADVANTAGE = 256

Take = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
"""Gives memory for a result, as `SparseStep.take`"""


class Entries(Protocol):
    """n entries of `[B, d_sae]`: row-major for decoding, in an order of their own for the gradients."""

    columns: torch.Tensor
    """`[n]`: the latent of each, in their own order"""

    def decode(self, acts: torch.Tensor, W_dec: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What each level's latents add to the output of rows start to stop: `[rows, n_levels, d_out]`."""
        ...

    def order(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[n]` of the entries, given row-major, in their own order."""
        ...

    def act_grads(self, output_grads: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        """Gradients of the activations `[n]`, from those of the levels' outputs `[B, n_levels, d_out]`."""
        ...

    def decoder_grad(self, acts: torch.Tensor, output_grads: torch.Tensor, take: Take) -> torch.Tensor:
        """`[d_sae, d_out]`"""
        ...

    def encoder_grad(self, act_grads: torch.Tensor, encoder_in: torch.Tensor, take: Take) -> torch.Tensor:
        """`[d_sae, d_in]`"""
        ...


def kept_entries(selection: Selection, levels: Levels, n_rows: int, W_dec: torch.Tensor) -> Entries:
    """The entries of a selection in the form that is the faster one.

    Args:
        selection: What was kept.
        levels: Of the latents.
        n_rows: B.
        W_dec: `[d_sae, d_out]`
    """
    dtype = gathered_dtype(W_dec)
    on_tensor_cores = W_dec.device.type == "cuda" and dtype == torch.bfloat16
    if on_tensor_cores and are_dense(len(selection.rows), n_rows * len(W_dec)):
        return DenseEntries(selection, levels, n_rows, dtype)
    return GatheredEntries(selection, levels, n_rows, dtype)


def are_dense(n: int, size: int) -> bool:
    """Whether tensor cores are to multiply a matrix of so many values, n of them not 0, as a dense one."""
    return size <= min(BLOCK_VALUES, TENSOR_CORE_ADVANTAGE * n)


class GatheredEntries:
    """As bags. Decoding, each (row, level) is one; backwards, each latent.

    Backwards they are in the order of the latents: the rows of small tables are then read from the cache, and
    those of large ones in sequence.
    """

    def __init__(self, selection: Selection, levels: Levels, n_rows: int, dtype: torch.dtype) -> None:
        self._decoded, self._n_levels, self._dtype = selection.columns, len(levels.widths), dtype
        # A level's latents are neighbours, so the bags are in order as the entries are.
        bags = selection.rows * self._n_levels + levels.of_latent[selection.columns]
        bounds = torch.arange(n_rows * self._n_levels + 1, device=bags.device)
        self._offsets = torch.searchsorted(bags, bounds)
        self._by_latent = ByLatent.of(selection.columns, levels.widths[-1])
        self.columns = self._by_latent.columns
        self._rows, self._bags = self.order(selection.rows), self.order(bags)

    def order(self, values: torch.Tensor) -> torch.Tensor:
        return values[self._by_latent.order]

    def decode(self, acts: torch.Tensor, W_dec: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        offsets = self._offsets[start * self._n_levels : stop * self._n_levels + 1]
        columns = self._decoded
        if len(offsets) < len(self._offsets):
            first, last = int(offsets[0]), int(offsets[-1])
            columns, acts, offsets = columns[first:last], acts[first:last], offsets - first
        parts = bag_sums(columns, W_dec.to(self._dtype), offsets, acts, scattered=True)
        return parts.view(stop - start, self._n_levels, -1)

    def act_grads(self, output_grads: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        # as they are: on a GPU, `row_dots` has to copy what it multiplies in bfloat16
        return row_dots(output_grads.flatten(0, 1), self._bags, W_dec, self.columns)

    def decoder_grad(self, acts: torch.Tensor, output_grads: torch.Tensor, take: Take) -> torch.Tensor:
        return self._by_latent.sum(self._bags, output_grads.flatten(0, 1).to(self._dtype), acts, take=take)

    def encoder_grad(self, act_grads: torch.Tensor, encoder_in: torch.Tensor, take: Take) -> torch.Tensor:
        return self._by_latent.sum(self._rows, encoder_in.to(self._dtype), act_grads, take=take)


class DenseEntries:
    """As a dense matrix, made anew for each product, so that there is one at a time."""

    def __init__(self, selection: Selection, levels: Levels, n_rows: int, dtype: torch.dtype) -> None:
        self._rows, self.columns, self._dtype = selection.rows, selection.columns, dtype
        self._shape, self._levels = (n_rows, levels.widths[-1]), list(pairwise((0, *levels.widths)))

    def order(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def decode(self, acts: torch.Tensor, W_dec: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        matrix, decoder = self._matrix(acts)[start:stop], W_dec.to(self._dtype)
        parts = decoder.new_empty(stop - start, len(self._levels), decoder.shape[1])
        for level, (first, last) in enumerate(self._levels):
            torch.mm(matrix[:, first:last], decoder[first:last], out=parts[:, level])
        return parts

    def act_grads(self, output_grads: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        given, decoder = output_grads.to(self._dtype), W_dec.to(self._dtype)
        grads = decoder.new_empty(self._shape)
        for level, (first, last) in enumerate(self._levels):
            torch.mm(given[:, level], decoder[first:last].T, out=grads[:, first:last])
        return grads[self._rows, self.columns]

    def decoder_grad(self, acts: torch.Tensor, output_grads: torch.Tensor, take: Take) -> torch.Tensor:  # noqa: ARG002
        matrix, given = self._matrix(acts), output_grads.to(self._dtype)
        grad = given.new_empty(self._shape[1], given.shape[-1])
        for level, (first, last) in enumerate(self._levels):
            torch.mm(matrix[:, first:last].T, given[:, level], out=grad[first:last])
        return grad

    def encoder_grad(self, act_grads: torch.Tensor, encoder_in: torch.Tensor, take: Take) -> torch.Tensor:  # noqa: ARG002
        return self._matrix(act_grads).T @ encoder_in.to(self._dtype)

    def _matrix(self, values: torch.Tensor) -> torch.Tensor:
        matrix = torch.zeros(self._shape, dtype=self._dtype, device=values.device)
        matrix[self._rows, self.columns] = values.to(self._dtype)
        return matrix


class ByLatent(NamedTuple):
    """Entries sorted by latent."""

    order: torch.Tensor
    """`[n]`: where each entry was before sorting"""
    columns: torch.Tensor
    """`[n]`: latent of each entry"""
    offsets: torch.Tensor
    """`[d_sae + 1]`: where the entries of each latent begin"""

    @classmethod
    def of(cls, columns: torch.Tensor, d_sae: int) -> ByLatent:
        order = stable_order(columns, d_sae)
        sorted_columns = columns[order]
        bounds = torch.arange(d_sae + 1, device=columns.device)
        return cls(order, sorted_columns, torch.searchsorted(sorted_columns, bounds))

    def sum(
        self,
        index: torch.Tensor,
        table: torch.Tensor,
        factors: torch.Tensor,
        *,
        take: Take | None = None,
    ) -> torch.Tensor:
        """For each latent, the sum over its entries e of factors[e] · table[index[e]]: `[d_sae, d]`.

        `take` gives the memory for it.
        """
        out = None
        if take is not None and takes_memory(table):
            out = take(table, (len(self.offsets) - 1, table.shape[1]))
        return bag_sums(index, table, self.offsets, factors, out=out)


def sum_by_latent(columns: torch.Tensor, values: torch.Tensor, d_sae: int) -> torch.Tensor:
    """The sum of each latent's values: `[d_sae]`, at least float32, since a latent may have thousands."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.zeros(d_sae, dtype=wide, device=values.device).index_add_(0, columns, values.to(wide))
