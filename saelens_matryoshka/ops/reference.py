"""The nested step, dense and obvious: the definition that every faster implementation is tested against.

With pre-activations `p = x W_enc + b_enc` (x - b_dec in place of x where the objective says so), scores
`s_j = p_j ‖W_dec[j]‖` (or p_j), and f = relu(s) on the selected entries, 0 elsewhere:

1. selection keeps the int(k·B) largest scores of the whole batch (Bussmann et al. 2024, BatchTopK) or the
   k largest of each row, once for all levels; of equal scores, those of lower index are kept;
2. level l predicts `ŷ_l = b_dec + Σ_{j < w_l} f_j / ‖W_dec[j]‖ · W_dec[j]` (+ `W_skip x`);
3. the loss is `Σ_l weight_l · mean_B Σ_d (ŷ_l - y)²` (Bussmann et al. 2025, Matryoshka SAEs), plus
4. the auxiliary loss of dead latents (Gao et al. 2024, appendix A.2) and an L1 term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saelens_matryoshka.ops.step import NestedObjective, NestedStep, NestedWeights


def nested_step(
    weights: NestedWeights,
    x: torch.Tensor,
    y: torch.Tensor,
    objective: NestedObjective,
    *,
    dead: torch.Tensor | None,
) -> NestedStep:
    """One step through autograd. See `NestedStepFn` for the arguments."""
    encoder_in = x - weights.b_dec if objective.subtract_b_dec else x
    hidden_pre = encoder_in @ weights.W_enc + weights.b_enc
    norms = weights.W_dec.norm(dim=-1)
    scores = hidden_pre * norms if objective.rescale_by_decoder_norm else hidden_pre
    feature_acts = scores.relu() * selection_mask(scores, objective.k, objective.selection)
    decoder_in = feature_acts * (1 / norms) if objective.rescale_by_decoder_norm else feature_acts

    predictions = nested_decode(decoder_in, weights.W_dec, weights.b_dec, objective.widths)
    if weights.W_skip is not None:
        predictions = predictions + x @ weights.W_skip.T
    level_losses = (predictions - y).pow(2).sum(dim=-1).mean(dim=-1)
    aux_loss = dead_latent_loss(weights, hidden_pre, y - predictions.detach(), objective, dead)
    unit_acts = feature_acts if objective.rescale_by_decoder_norm else feature_acts * norms
    l1_loss = objective.l1_coefficient * unit_acts.sum(dim=-1).mean()

    level_weights = level_losses.new_tensor(objective.level_weights)
    kept = feature_acts.detach()
    kept = kept[kept > 0]
    return NestedStep(
        loss=(level_weights * level_losses).sum() + aux_loss + l1_loss,
        level_losses=level_losses.detach(),
        aux_loss=aux_loss.detach(),
        l1_loss=l1_loss.detach(),
        prediction=predictions[-1].detach(),
        feature_acts=feature_acts.detach(),
        hidden_pre=hidden_pre.detach(),
        batch_threshold=kept.min() if kept.numel() else scores.new_zeros(()),
    )


def selection_mask(scores: torch.Tensor, k: float, selection: str) -> torch.Tensor:
    """Which entries are kept: the positive ones among the largest, ties by lower index.

    Args:
        scores: `[B, d_sae]`.
        k: Entries per row; an average over the batch when selection is "batch".
        selection: "batch" or "token".

    Returns:
        Boolean mask `[B, d_sae]`.
    """
    if selection == "token":
        return _largest(scores.detach(), int(k)) & (scores > 0)
    flat = scores.detach().flatten()[None]
    return _largest(flat, int(k * len(scores))).view_as(scores) & (scores > 0)


def _largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Mask of the n largest entries of each row of `[rows, columns]`, ties by lower index."""
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    smallest_kept = values.topk(n, dim=-1).values[:, -1:]
    above = values > smallest_kept
    tied = values == smallest_kept
    places = n - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= places))


def nested_decode(
    decoder_in: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    widths: Sequence[int],
) -> torch.Tensor:
    """The output of every prefix, narrowest first.

    Args:
        decoder_in: Activations `[*batch, d_sae]`.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        widths: Cumulative widths.

    Returns:
        `[n_levels, *batch, d_out]`.
    """
    levels: list[torch.Tensor] = []
    output, start = b_dec, 0
    for width in widths:
        output = output + decoder_in[..., start:width] @ W_dec[start:width]
        levels.append(output)
        start = width
    return torch.stack(levels)


def dead_latent_loss(
    weights: NestedWeights,
    hidden_pre: torch.Tensor,
    residuals: torch.Tensor,
    objective: NestedObjective,
    dead: torch.Tensor | None,
) -> torch.Tensor:
    """The auxiliary loss: the top dead latents of each row predict what the living leave over.

    As many of them as `aux_k` says, d_out/2 by default; the loss is scaled down when fewer are dead. With
    `aux_per_level`, each level's dead latents predict the residual of their own level, each with that budget.

    Args:
        weights: The parameters.
        hidden_pre: `[B, d_sae]`.
        residuals: `[n_levels, B, d_out]`, target minus prediction of each level, without gradient.
        objective: The loss.
        dead: Mask `[d_sae]`, or None.

    Returns:
        Scalar, coefficient included.
    """
    total = residuals.new_zeros(())
    if dead is None or objective.aux_coefficient == 0:
        return total
    if objective.aux_per_level:
        groups = list(zip((0, *objective.widths), objective.widths, residuals, strict=False))
    else:
        groups = [(0, objective.widths[-1], residuals[-1])]
    norms = weights.W_dec.norm(dim=-1) if objective.rescale_by_decoder_norm else None
    for start, stop, residual in groups:
        columns = start + dead[start:stop].nonzero().squeeze(1)
        if len(columns) == 0:
            continue
        budget = objective.aux_budget(residual.shape[-1])
        pre = hidden_pre[:, columns]
        ranking = pre.detach() if norms is None else (pre * norms[columns]).detach()
        acts = pre * _largest(ranking, min(budget, len(columns)))
        error = (acts @ weights.W_dec[columns] - residual).pow(2).sum(dim=-1).mean()
        total = total + min(len(columns) / budget, 1.0) * error
    return objective.aux_coefficient * total
