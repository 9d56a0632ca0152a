"""The threshold at which the inference model keeps k latents per token.

TopK training selects by rank, the saved JumpReLU model by a threshold. A moving average of the batches' own
thresholds starts at 0 and lags behind the training; this calibration instead takes source rows of the last
batches and, with the weights as they are now, the threshold that exactly k·N of their scores exceed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from saelens_matryoshka.ops import ALONE, Group

# Rows kept: few enough to be cheap, and from many batches, because L0 differs more between texts than between
# the tokens of one text.
MAX_ROWS = 16_384
ROWS_PER_BATCH = 128
# Scores computed at a time.
CHUNK_VALUES = 1 << 25


class RecentRows:
    """Source rows of the last training batches."""

    def __init__(self, batches: Iterable[torch.Tensor] = ()) -> None:
        self._batches = deque(batches)

    def add(self, source: torch.Tensor, row_blocks: int = 1) -> None:
        """Keep some rows of a batch `[B, d_in]`; the oldest go when there are enough.

        Args:
            source: The batch, or one of `row_blocks` blocks of it.
            row_blocks: Among so many processes the batch, and what is kept of it, is divided.
        """
        stride = max(1, -(-len(source) * row_blocks // ROWS_PER_BATCH))
        self._batches.append(source[::stride].detach().clone())
        while len(self._batches) > 1 and self.count() - len(self._batches[0]) >= MAX_ROWS // row_blocks:
            self._batches.popleft()

    def count(self) -> int:
        """Rows kept."""
        return sum(map(len, self._batches))

    def clear(self) -> None:
        """Forget them."""
        self._batches.clear()

    def to(self, device: torch.device) -> None:
        """Move them."""
        self._batches = deque(batch.to(device) for batch in self._batches)

    def batches(self) -> list[torch.Tensor]:
        """Those of each batch, `[≤ 128, d_in]`, the oldest first."""
        return list(self._batches)

    def rows(self) -> torch.Tensor:
        """`[n, d_in]`."""
        return torch.cat(self.batches())


@torch.no_grad()
def threshold_for_l0(
    rows: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    k: float,
    guess: float,
    group: Group = ALONE,
) -> float:
    """The threshold that int(k·N) of the scores of N rows exceed, 0 if fewer are positive.

    Args:
        rows: Encoder input `[N, d_in]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        norms: Decoder norms `[d_sae]` the scores are multiplied by, or None.
        k: Wanted mean number of scores above the threshold per row.
        guess: About where the threshold is; scores far below it are searched only if need be.
        group: Who shares the rows or the latents.
    """
    n = int(k * group.count(len(rows), "rows"))
    dtype = torch.promote_types(W_enc.dtype, torch.float32)
    rows, W_enc, b_enc = rows.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
    chunks = rows.split(max(1, CHUNK_VALUES // W_enc.shape[1]))
    for cutoff in (0.7 * guess, 0.0):
        candidates = torch.cat([_scores_above(chunk, W_enc, b_enc, norms, cutoff) for chunk in chunks])
        if group.count(len(candidates), "all") > n:
            # a score is kept if it is larger than the threshold, so the first not to be kept is it
            return group.kth_largest(candidates, n + 1).item()
    return 0.0


def _scores_above(
    rows: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    cutoff: float,
) -> torch.Tensor:
    scores = torch.addmm(b_enc, rows, W_enc)
    if norms is not None:
        scores.mul_(norms)
    return scores[scores > cutoff]
