"""How the latents' decoder directions relate: nearest ones, and which coarser latent each one refines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from saelens_matryoshka.widths import latent_levels

_CHUNK_VALUES = 1 << 25


@dataclass(frozen=True)
class DecoderRelations:
    """Cosines between decoder rows, within and between the levels of a nested dictionary."""

    nearest: torch.Tensor
    """`[d_sae, n]` the latents nearest each one, nearest first"""
    nearest_cosine: torch.Tensor
    """`[d_sae, n]`"""
    parent: torch.Tensor
    """`[d_sae]` the nearest latent of all coarser levels, which a fine one refines; -1 in the first level"""
    parent_cosine: torch.Tensor
    """`[d_sae]` 0 in the first level"""
    mean_cosine: torch.Tensor
    """`[n_levels, n_levels]` mean over a level's latents (row) of the cosine to the nearest other one of a
    coarser level, or of the same (column); 0 above the diagonal"""
    parents_in: torch.Tensor
    """`[n_levels, n_levels]` share of a level's latents (row) whose parent is in a coarser level (column)"""


@torch.no_grad()
def decoder_relations(W_dec: torch.Tensor, widths: Sequence[int], n: int = 5) -> DecoderRelations:
    """Compute them a block of rows at a time.

    Args:
        W_dec: `[d_sae, d_out]`.
        widths: Cumulative widths of the levels.
        n: Nearest latents kept of each.
    """
    rows = F.normalize(W_dec.to(torch.promote_types(W_dec.dtype, torch.float32)), dim=-1)
    d_sae, n_levels = len(rows), len(widths)
    n = min(n, d_sae - 1)
    bounds = [0, *widths]
    level = latent_levels(widths)
    ids, cosines, parents, parent_cosines = [], [], [], []
    sums = torch.zeros(n_levels, n_levels, dtype=torch.float64)
    for start in range(0, d_sae, max(1, _CHUNK_VALUES // d_sae)):
        block = rows[start : start + max(1, _CHUNK_VALUES // d_sae)] @ rows.T
        here = torch.arange(len(block), device=block.device)
        block[here, here + start] = -torch.inf  # itself
        best = block.topk(n, dim=1)
        ids.append(best.indices.cpu())
        cosines.append(best.values.cpu())
        # the nearest of every level, [rows, n_levels]
        per_level = [block[:, low:high].max(dim=1) for low, high in pairwise(bounds)]
        value = torch.stack([found.values for found in per_level], dim=1).cpu()
        index = torch.stack([found.indices for found in per_level], dim=1).cpu() + torch.tensor(bounds[:-1])
        own = level[start : start + len(block)]
        value = torch.where(value.isinf(), 0, value)  # alone in its level
        sums.index_add_(0, own, value.double())
        coarser = torch.arange(n_levels) < own[:, None]
        found = torch.where(coarser, value, -torch.inf).max(dim=1)
        parents.append(torch.where(own > 0, index.gather(1, found.indices[:, None]).squeeze(1), -1))
        parent_cosines.append(torch.where(own > 0, found.values, 0))
    sizes = torch.bincount(level, minlength=n_levels).double()[:, None]
    parent = torch.cat(parents)
    fine = parent >= 0
    pairs = level[fine] * n_levels + level[parent[fine]]
    counts = torch.bincount(pairs, minlength=n_levels**2).view(n_levels, n_levels)
    return DecoderRelations(
        nearest=torch.cat(ids),
        nearest_cosine=torch.cat(cosines),
        parent=parent,
        parent_cosine=torch.cat(parent_cosines),
        mean_cosine=(sums / sizes).tril(),
        parents_in=counts / sizes,
    )
