"""BatchTopK and TopK at a cost that follows the candidates, not the dictionary.

The k·B largest of B·d_sae scores are a fraction of a percent of them. Their smallest hardly moves from one
batch to the next, so all but a few scores can be dismissed by one comparison with a *cutoff* a little below
the last one; the exact choice is then made among the few *candidates* that remain. Should fewer than k·B
remain, the cutoff was too high, and the scores are searched again from a lower one: the result is always
that of the full top-k, ties going to the lower index. Where processes share a batch or a dictionary, each
searches its block, and the choice is made among the candidates of all (see `Group`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.group import ALONE, Group
from saelens_matryoshka.ops.order import kth_largest, true_places

# How far below the last batch's threshold the candidates begin.
_MARGIN = 0.9
# Rows from which the first cutoff is estimated, and how many more than k of their scores it lets through.
_SAMPLE_ROWS = 256
_SAMPLE_SLACK = 1.5
# Shares of a cutoff that are tried if it was too high. At 0 half of all scores are kept beside their indices.
_LOWER = (0.85, 0.7, 0.5, 0.0)


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
    encoder: Encoder,
    norms: torch.Tensor | None,
    k: float,
    *,
    last_threshold: torch.Tensor | None,
    group: Group = ALONE,
) -> Selection:
    """The int(k·B) largest scores of the batch, if positive: of all blocks of it that a group holds.

    Args:
        encoder: Of the batch, `[B, d_sae]`.
        norms: Decoder norms `[d_sae]` the scores are multiplied by, or None.
        k: Entries per row on average.
        last_threshold: Scalar, the batch threshold of the step before, or None.
        group: Who shares the batch and the dictionary.
    """
    n = int(k * (encoder.n_rows * group.row_blocks))  # rounded as of a process alone
    if last_threshold is None:
        cutoff = _sampled_cutoff(encoder, norms, k, group)
    else:
        last = last_threshold.to(encoder.b_enc.device)  # the dictionary may have been moved
        cutoff = (_MARGIN * last).clamp(min=0)
    # With others, a cutoff of one's own would leave out what is among the largest of all.
    index, pre, scores, raised = _candidates(encoder, norms, cutoff, enough=n if group is ALONE else None)
    found = group.count(len(index), "all")
    if found < n and bool(raised > cutoff):
        index, pre, scores, _ = _candidates(encoder, norms, cutoff)
        found = len(index)
    lower = [factor * cutoff for factor in _LOWER]
    if found < n and last_threshold is not None and bool(cutoff > 0):
        sampled = torch.minimum(cutoff, _sampled_cutoff(encoder, norms, k, group))
        lower = [sampled, *(factor * sampled for factor in _LOWER)]
    while found < n and lower and bool(cutoff > 0):
        cutoff = lower.pop(0)
        index, pre, scores, _ = _candidates(encoder, norms, cutoff)
        found = group.count(len(index), "all")
    if found > n:
        keep = group.largest(scores, n, index, (encoder.n_rows, encoder.d_sae))
        if group is ALONE:  # the number is known
            keep = true_places(keep, n)
        index, pre, scores = index[keep], pre[keep], scores[keep]
    return _selection(index // encoder.d_sae, index % encoder.d_sae, pre, scores, group)


def select_token(encoder: Encoder, norms: torch.Tensor | None, k: int, *, group: Group = ALONE) -> Selection:
    """The k largest scores of each row, if positive. Arguments as in `select_batch`."""
    found: list[tuple[torch.Tensor, ...]] = []
    for start, product in encoder.blocks():
        hidden_pre = product + encoder.b_enc
        scores = (hidden_pre if norms is None else hidden_pre * norms).relu()
        keep = largest_of_rows(scores, k, group, positive=True)
        rows, columns = keep.nonzero(as_tuple=True)
        found.append((rows + start, columns, hidden_pre[rows, columns], scores[rows, columns]))
    return _selection(*(torch.cat(parts) for parts in zip(*found, strict=True)), group=group)


def largest_of_rows(
    scores: torch.Tensor, k: int, group: Group = ALONE, *, positive: bool = False
) -> torch.Tensor:
    """Mask of the k largest of each row of `[rows, m]`, or of the positive among them.

    The k largest are chosen among all of a group's latents, ties going to the lower index.
    """
    thresholds, places = group.row_thresholds(scores, k)
    keep = scores >= thresholds  # right but for ties
    if positive:
        keep &= scores > 0
    crowded = (keep.sum(dim=-1) > places).nonzero().squeeze(1)
    if len(crowded):
        _drop_last_ties(keep, scores, thresholds, places, crowded)
    return keep


def _drop_last_ties(
    keep: torch.Tensor,
    scores: torch.Tensor,
    thresholds: torch.Tensor,
    places: torch.Tensor,
    crowded: torch.Tensor,
) -> None:
    """In these rows, keep as many as there are places: all larger ones, and the first of the tied."""
    tied = scores[crowded] == thresholds[crowded]
    row, column = (tied & keep[crowded]).nonzero(as_tuple=True)
    n_tied = torch.bincount(row, minlength=len(crowded))
    rank = torch.arange(len(row), device=row.device) - (n_tied.cumsum(0) - n_tied)[row]
    room = places[crowded] - (keep[crowded].sum(dim=-1) - n_tied)
    late = rank >= room[row]
    keep[crowded[row[late]], column[late]] = False


def _selection(
    rows: torch.Tensor, columns: torch.Tensor, pre: torch.Tensor, scores: torch.Tensor, group: Group
) -> Selection:
    smallest = scores.min() if len(scores) else scores.new_full((), torch.inf)
    smallest = group.min(smallest, "all")
    return Selection(rows, columns, pre, scores, torch.where(smallest.isinf(), 0, smallest))


class _Candidates(NamedTuple):
    """The positive scores above a cutoff, row-major."""

    index: torch.Tensor
    """`[n]`, flat"""
    pre: torch.Tensor
    """`[n]`, pre-activations"""
    scores: torch.Tensor
    """`[n]`"""
    cutoff: torch.Tensor
    """scalar"""


def _candidates(
    encoder: Encoder, norms: torch.Tensor | None, cutoff: torch.Tensor, *, enough: int | None = None
) -> _Candidates:
    """Those above the cutoff, or above a higher one that should leave enough."""
    index, pre, cutoff = encoder.entries_above(cutoff, norms, enough=enough)
    scores = pre if norms is None else pre * norms[index % encoder.d_sae]
    above = (scores > cutoff).nonzero().squeeze(1)
    return _Candidates(index[above], pre[above], scores[above], cutoff)


def _sampled_cutoff(encoder: Encoder, norms: torch.Tensor | None, k: float, group: Group) -> torch.Tensor:
    """A cutoff that a sample of the rows says lets more than k·B candidates through.

    Without one, half of all scores would be kept beside their indices.
    """
    sample = encoder.sample(_SAMPLE_ROWS)
    scores = (sample if norms is None else sample * norms).relu().flatten()
    n = min(max(1, int(_SAMPLE_SLACK * k * len(sample))), scores.numel())
    return group.min(kth_largest(scores, n).squeeze(), "all")
