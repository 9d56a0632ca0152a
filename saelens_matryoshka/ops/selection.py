"""BatchTopK and TopK at a cost that follows the candidates, not the dictionary.

The k·B largest of B·d_sae scores are a fraction of a percent of them. Their smallest hardly moves from one
batch to the next, so all but a few scores can be dismissed by one comparison with a *cutoff* a little below
the last one; the exact choice is then made among the few *candidates* that remain. Should fewer than k·B
remain, the cutoff was too high, and the scores are searched again from a lower one: the result is always
that of the full top-k, ties going to the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# How far below the last batch's threshold the candidates begin.
_MARGIN = 0.9
# Rows from which the first cutoff is estimated, and how many more than k of their scores it lets through.
_SAMPLE_ROWS = 64
_SAMPLE_SLACK = 1.5


class Selection(NamedTuple):
    """The kept entries of `[B, d_sae]`, in row-major order, every one positive."""

    rows: torch.Tensor
    """`[n]`"""
    columns: torch.Tensor
    """`[n]`"""
    pre: torch.Tensor
    """`[n]`, pre-activations"""
    scores: torch.Tensor
    """`[n]`, pre-activations in the units they were selected by"""
    batch_threshold: torch.Tensor
    """scalar: the smallest score kept, 0 if none was"""


def select_batch(
    hidden_pre: torch.Tensor,
    norms: torch.Tensor | None,
    k: float,
    *,
    last_threshold: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> Selection:
    """The int(k·B) largest scores of the batch, if positive.

    Args:
        hidden_pre: `[B, d_sae]`.
        norms: Decoder norms `[d_sae]` the scores are multiplied by, or None.
        k: Entries per row on average.
        last_threshold: Scalar, the batch threshold of the step before, or None.
        mask: Boolean scratch `[B, d_sae]`, to spare its allocation.
    """
    n = int(k * len(hidden_pre))
    cutoff = _MARGIN * last_threshold if last_threshold is not None else None
    if cutoff is None:
        cutoff = _estimated_cutoff(hidden_pre, norms, k)
    index, pre, scores = _candidates(hidden_pre, norms, cutoff, mask)
    if len(index) < n and bool(cutoff > 0):
        index, pre, scores = _candidates(hidden_pre, norms, torch.zeros_like(cutoff), mask)
    if len(index) > n:
        keep = _largest(scores, n)
        index, pre, scores = index[keep], pre[keep], scores[keep]
    d_sae = hidden_pre.shape[1]
    return Selection(
        rows=index // d_sae,
        columns=index % d_sae,
        pre=pre,
        scores=scores,
        batch_threshold=scores.min() if len(scores) else scores.new_zeros(()),
    )


def select_token(hidden_pre: torch.Tensor, norms: torch.Tensor | None, k: int) -> Selection:
    """The k largest scores of each row, if positive. Arguments as in `select_batch`."""
    scores = (hidden_pre if norms is None else hidden_pre * norms).relu()
    smallest_kept = scores.topk(k, dim=-1).values[:, -1:]
    # ">= and positive" is right but for ties, which go to the lower index
    keep = (scores >= smallest_kept) & (scores > 0)
    surplus = keep.sum(dim=-1) - k
    for row in (surplus > 0).nonzero().squeeze(1).tolist():
        tied = (scores[row] == smallest_kept[row]).nonzero().squeeze(1)
        keep[row, tied[len(tied) - int(surplus[row]) :]] = False
    rows, columns = keep.nonzero(as_tuple=True)
    kept = scores[rows, columns]
    return Selection(
        rows=rows,
        columns=columns,
        pre=hidden_pre[rows, columns],
        scores=kept,
        batch_threshold=kept.min() if len(kept) else kept.new_zeros(()),
    )


def _candidates(
    hidden_pre: torch.Tensor,
    norms: torch.Tensor | None,
    cutoff: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat index, pre-activation and score of the positive scores above the cutoff, row-major."""
    # The comparison is made in the units of the pre-activations, so that the scores need not be stored;
    # rounding may only let a few more through, which the exact choice then dismisses.
    bound = cutoff * (1 - 1e-5)
    bound = bound if norms is None else bound / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    bound = bound.clamp(max=torch.finfo(hidden_pre.dtype).max).to(hidden_pre.dtype)
    above = torch.gt(hidden_pre, bound, out=mask)
    index = _nonzero(above)
    pre = hidden_pre.view(-1)[index]
    scores = pre if norms is None else pre * norms[index % hidden_pre.shape[1]]
    return index, pre, scores


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices of the true entries of a contiguous mask."""
    if mask.device.type == "cpu":
        # numpy skips the false ones faster than torch does
        return torch.from_numpy(mask.view(-1).numpy().nonzero()[0])
    return mask.view(-1).nonzero().squeeze(1)


def _largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Mask of the n largest of more than n scores `[m]`, ties by lower index."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    smallest_kept = scores.topk(n, sorted=False).values.min()
    above = scores > smallest_kept
    tied = scores == smallest_kept
    return above | (tied & (tied.cumsum(0) <= n - above.sum()))


def _estimated_cutoff(hidden_pre: torch.Tensor, norms: torch.Tensor | None, k: float) -> torch.Tensor:
    """A cutoff that a sample of the rows says lets more than k·B candidates through."""
    stride = max(1, len(hidden_pre) // _SAMPLE_ROWS)
    sample = hidden_pre[::stride]
    scores = (sample if norms is None else sample * norms).relu().flatten()
    n = min(max(1, int(_SAMPLE_SLACK * k * len(sample))), scores.numel())
    return scores.topk(n, sorted=False).values.min()
