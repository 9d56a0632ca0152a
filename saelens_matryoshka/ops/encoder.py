"""The encoder's product, the one dense product of a step, a block of rows at a time if it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

# Pre-activations in memory at a time: 512 MB in float32. All at once wherever that suffices, since every
# further block costs a synchronisation on a GPU.
BLOCK_VALUES = 1 << 27


class Encoder:
    """The product `x W_enc` of a batch, without autograd; pre-activations are it plus `b_enc`.

    The bias is left to whoever reads an entry: added to all of them, it would be a second pass over the
    largest tensor of a step. Each pass over `blocks` also collects the columns of the dead latents. A second
    pass computes the product again only if it was made in several blocks.
    """

    def __init__(
        self,
        encoder_in: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        dead_columns: torch.Tensor | None,
        scratch: Callable[..., torch.Tensor | None],
    ) -> None:
        self.n_rows, self.d_sae, self.b_enc = len(encoder_in), W_enc.shape[1], b_enc
        self._encoder_in, self._W_enc, self._scratch = encoder_in, W_enc, scratch
        self._dead_columns = dead_columns if dead_columns is not None and len(dead_columns) else None
        self._dead_pre: list[torch.Tensor] = []
        self._whole: torch.Tensor | None = None

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of rows: the index of the first, and their products `[rows, d_sae]`.

        A block is overwritten by the next.
        """
        if self._whole is not None:
            yield 0, self._whole
            return
        block_rows = min(self.n_rows, max(1, BLOCK_VALUES // self.d_sae))
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
        """Pre-activations of the dead latents `[B, n_dead]`, after a pass over the blocks."""
        if len(self._dead_pre) == 1:  # which cat would copy
            return self._dead_pre[0]
        return torch.cat(self._dead_pre) if self._dead_pre else None

    def sample(self, n: int) -> torch.Tensor:
        """Pre-activations of about n rows, spread over the batch."""
        rows = self._encoder_in[:: max(1, self.n_rows // n)]
        return torch.addmm(self.b_enc, rows, self._W_enc)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        out = None
        if not torch.is_autocast_enabled(rows.device.type):  # which chooses the dtype itself
            out = self._scratch("product", rows.device, (len(rows), self.d_sae), self._W_enc.dtype)
        return torch.mm(rows, self._W_enc, out=out)
