"""The encoder's product, the one dense product of a step, a block of rows at a time if it is large; or what
is needed of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saelens_matryoshka.ops.bags import row_dots
from saelens_matryoshka.ops.order import tile_order
from saelens_matryoshka.ops.scan import entries_above
from saelens_matryoshka.ops.screen import Scratch, Screen

# Pre-activations in memory at a time: 512 MB in float32. All at once wherever that suffices, since every
# further block costs a synchronisation on a GPU.
BLOCK_VALUES = 1 << 27
# Values of a batch that stay in the cache of a CPU's core while entries are computed.
_TILE_VALUES = 3 << 17


class Encoder:
    """The product `x W_enc` of a batch, without autograd; pre-activations are it plus `b_enc`.

    The bias is left to whoever reads an entry: added to all of them, it would be a second pass over the
    largest tensor of a step. Each pass over `blocks` also collects the columns of the dead latents. A second
    pass computes the product again only if it was made in several blocks.

    With a screen the product is made only where the screen is of no use, and either way an entry is computed
    by itself, so that its value does not depend on how it was found.
    """

    def __init__(
        self,
        encoder_in: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        dead_columns: torch.Tensor | None,
        scratch: Scratch,
        *,
        screened: bool = False,
    ) -> None:
        self.n_rows, self.d_sae, self.b_enc = len(encoder_in), W_enc.shape[1], b_enc
        self._encoder_in, self._W_enc, self._scratch = encoder_in, W_enc, scratch
        self._dead_columns = dead_columns if dead_columns is not None and len(dead_columns) else None
        self._dead_pre: list[torch.Tensor] = []
        self._whole: torch.Tensor | None = None
        self._screen = Screen(encoder_in, W_enc, b_enc, scratch) if screened else None

    def entries_above(
        self, cutoff: torch.Tensor, norms: torch.Tensor | None, *, enough: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All scores above a cutoff, and maybe some just below it.

        Args:
            cutoff: Scalar, not negative.
            norms: `[d_sae]`, which make scores of pre-activations, or None.
            enough: How many entries are needed. Where a sample shows far more of them the cutoff is raised.

        Returns:
            Flat indices `[n]`, increasing, the pre-activations there `[n]`, and the cutoff.
        """
        # Compared with what would make the score the cutoff, so that the scores need not be stored.
        bounds = cutoff if norms is None else cutoff / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        bounds = bounds.expand(self.d_sae)
        if self._screen is None:
            index, products = self._products_above(bounds)
            return index, products + self.b_enc[index % self.d_sae], cutoff
        # in half the bytes per value
        passed = self._screen.entries_above(bounds, self._block_rows(2 * BLOCK_VALUES), enough=enough)
        if passed is None:
            index, raised = self._products_above(bounds - self._screen.rounding)[0], 1.0
        else:
            index, raised = passed
        return index, self._computed(index), cutoff * raised

    def _computed(self, index: torch.Tensor) -> torch.Tensor:
        """The pre-activations at flat indices, each computed by itself."""
        rows, columns, x, by_latent = index // self.d_sae, index % self.d_sae, self._encoder_in, self._W_enc.T
        if index.device.type != "cpu":
            return row_dots(x, rows, by_latent, columns) + self.b_enc[columns]
        order = tile_order(rows, columns, self.d_sae, max(1, _TILE_VALUES // x.shape[1]))
        dots = row_dots(x, rows[order], by_latent, columns[order])
        return torch.empty_like(dots).index_copy_(0, order, dots) + self.b_enc[columns]

    def _products_above(self, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The product is compared with what would make the pre-activation the bound, low enough that rounding
        # dismisses none.
        bounds = bounds.clamp(max=torch.finfo(bounds.dtype).max / 8)
        lowest = bounds - self.b_enc
        rounding = 4 * torch.finfo(lowest.dtype).eps * (bounds.abs() + self.b_enc.abs())
        found, found_products = [], []
        for start, product in self.blocks():
            slack = rounding + 4 * torch.finfo(product.dtype).eps * lowest.abs()
            index, products = entries_above(product, (lowest - slack).to(product.dtype))
            found.append(index + start * self.d_sae)
            found_products.append(products)
        return torch.cat(found), torch.cat(found_products)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of rows: the index of the first, and their products `[rows, d_sae]`.

        A block is overwritten by the next.
        """
        if self._whole is not None:
            yield 0, self._whole
            return
        block_rows = self._block_rows(BLOCK_VALUES)
        self._dead_pre = []
        for start in range(0, self.n_rows, block_rows):
            product = self._multiply(self._encoder_in[start : start + block_rows])
            if self._dead_columns is not None:
                dead = product.index_select(1, self._dead_columns)
                self._dead_pre.append(dead + self.b_enc[self._dead_columns])
            if block_rows == self.n_rows:
                self._whole = product
            yield start, product

    def dead_pre(self) -> torch.Tensor | None:
        """Pre-activations of the dead latents `[B, n_dead]`, after a pass over the blocks or a search."""
        if self._screen is not None and self._dead_columns is not None:
            dead = self._dead_columns
            return torch.addmm(self.b_enc[dead], self._encoder_in, self._W_enc.T[dead].T)
        if len(self._dead_pre) == 1:  # which cat would copy
            return self._dead_pre[0]
        return torch.cat(self._dead_pre) if self._dead_pre else None

    def sample(self, n: int) -> torch.Tensor:
        """Pre-activations of about n rows, spread over the batch."""
        rows = self._encoder_in[:: max(1, self.n_rows // n)]
        return torch.addmm(self.b_enc, rows, self._W_enc)

    def _block_rows(self, values: int) -> int:
        return min(self.n_rows, max(1, values // self.d_sae))

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        out = None
        if not torch.is_autocast_enabled(rows.device.type):  # which chooses the dtype itself
            out = self._scratch("product", rows.device, (len(rows), self.d_sae), self._W_enc.dtype)
        return torch.mm(rows, self._W_enc, out=out)
