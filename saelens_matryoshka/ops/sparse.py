"""The nested step at a cost that follows the active latents: one dense product, the encoder's.

The same function as `saelens_matryoshka.ops.reference`, to rounding. With n ≈ k·B kept entries:

1. the encoder's product, without autograd; the selection dismisses all but a few entries in one pass;
2. every (row, level) is a *bag* of entries. The entries are in row-major order and the latents of a level
   are neighbours, so one `embedding_bag` decodes all levels, a running sum over levels makes the
   predictions, and the cost does not depend on the number of levels;
3. the gradient of level l's latents is the sum over the levels m ≥ l of their residuals, a running sum
   from the other end. With it, the gradients of the entries, of the decoder rows and of the encoder
   columns are again bags: of entries per latent this time;
4. the auxiliary loss is computed on the dead columns alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from saelens_matryoshka.ops.selection import Selection, select_batch, select_token
from saelens_matryoshka.ops.step import NestedObjective, NestedStep, NestedWeights
from saelens_matryoshka.widths import latent_levels

# Values of [rows, levels, d_out] decoded at a time on a CPU, so that they stay in its cache.
_CPU_DECODE_VALUES = 1 << 19


class SparseStep:
    """The step as a callable that remembers, from batch to batch, where the candidates begin.

    What it remembers changes the speed, never the result.
    """

    def __init__(self) -> None:
        self._last_threshold: torch.Tensor | None = None
        self._scratch: dict[str, torch.Tensor] = {}

    def __call__(
        self,
        weights: NestedWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        objective: NestedObjective,
        *,
        dead: torch.Tensor | None,
    ) -> NestedStep:
        """Run one step. See `NestedStepFn` for the arguments."""
        dead_columns = None
        if dead is not None and objective.aux_coefficient > 0:
            dead_columns = dead.nonzero().squeeze(1)
        loss, parts = _run(self, weights, x, y, objective, dead_columns)
        chosen = parts.selection
        self._last_threshold = chosen.batch_threshold if len(chosen.rows) else None
        shape = (len(x), weights.W_dec.shape[0])
        index = torch.stack([chosen.rows, chosen.columns])
        return NestedStep(
            loss=loss,
            level_losses=parts.level_losses,
            aux_loss=parts.aux_loss,
            l1_loss=parts.l1_loss,
            prediction=parts.prediction,
            feature_acts=_coo(index, chosen.scores, shape),
            hidden_pre=_coo(index, chosen.pre, shape),
            batch_threshold=chosen.batch_threshold,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseStep:
        return SparseStep()

    def scratch(self, name: str, like: torch.Tensor, shape: tuple[int, ...], dtype: Any) -> Any:
        """A buffer kept from step to step on a CPU, where fresh memory costs as much as a pass over it."""
        if like.device.type != "cpu":
            return None
        buffer = self._scratch.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            buffer = self._scratch[name] = torch.empty(shape, dtype=dtype)
        return buffer


class _Parts(NamedTuple):
    level_losses: torch.Tensor
    aux_loss: torch.Tensor
    l1_loss: torch.Tensor
    prediction: torch.Tensor
    selection: Selection


def _run(
    step: SparseStep,
    weights: NestedWeights,
    x: torch.Tensor,
    y: torch.Tensor,
    objective: NestedObjective,
    dead_columns: torch.Tensor | None,
) -> tuple[torch.Tensor, _Parts]:
    box: list[_Parts] = []
    loss = _NestedLoss.apply(*weights, x, y, objective, dead_columns, step, box)
    assert isinstance(loss, torch.Tensor)
    return loss, box[0]


class _NestedLoss(torch.autograd.Function):
    """Total loss of the step; its other results are put into `box`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        W_skip: torch.Tensor | None,
        x: torch.Tensor,
        y: torch.Tensor,
        objective: NestedObjective,
        dead_columns: torch.Tensor | None,
        step: SparseStep,
        box: list[_Parts],
    ) -> torch.Tensor:
        encoder_in = x - b_dec if objective.subtract_b_dec else x
        hidden_pre = _encode(encoder_in, W_enc, b_enc, step)
        norms = W_dec.norm(dim=-1)
        selection_norms = norms if objective.rescale_by_decoder_norm else None
        if objective.selection == "token":
            selection = select_token(hidden_pre, selection_norms, int(objective.k))
        else:
            selection = select_batch(
                hidden_pre,
                selection_norms,
                objective.k,
                last_threshold=step._last_threshold,
                mask=step.scratch("mask", hidden_pre, tuple(hidden_pre.shape), torch.bool),
            )
        acts = selection.pre.to(W_dec.dtype)
        base = b_dec if W_skip is None else torch.addmm(b_dec, x, W_skip.T).to(b_dec.dtype)
        levels = latent_levels(objective.widths, device=W_dec.device)
        decoded = _nested_residuals(selection, acts, levels, W_dec, base, y, objective)
        aux = _aux_forward(hidden_pre, W_dec, decoded.residuals, selection_norms, objective, dead_columns)
        l1_loss = (acts * norms[selection.columns]).sum() * (objective.l1_coefficient / len(x))

        prediction = y + decoded.residuals[:, -1]
        level_weights = decoded.level_losses.new_tensor(objective.level_weights)
        box.append(_Parts(decoded.level_losses, aux.loss, l1_loss, prediction, selection))
        ctx.save_for_backward(W_enc, W_dec, W_skip, x, encoder_in)
        ctx.selection, ctx.acts, ctx.norms, ctx.levels = selection, acts, norms, levels
        ctx.bags, ctx.bag_offsets = decoded.bags, decoded.offsets
        ctx.output_grads = _output_grads(decoded.residuals, level_weights)
        ctx.aux, ctx.objective = aux, objective
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        return (level_weights * decoded.level_losses).sum() + aux.loss + l1_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        W_enc, W_dec, W_skip, x, encoder_in = ctx.saved_tensors
        selection, objective, aux = ctx.selection, ctx.objective, ctx.aux
        d_out = W_dec.shape[1]
        output_grads = ctx.output_grads  # [B, n_levels, d_out]
        ctx.output_grads = ctx.aux = None  # free them now: the trainer holds on to the loss
        per_bag = output_grads.view(-1, d_out)
        base_grad = output_grads[:, 0] * grad_loss  # every level contains the base

        act_grads = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            per_bag, W_dec, selection.columns, ctx.bag_offsets, ctx.bags, 0, -1
        )
        l1_rate = objective.l1_coefficient / len(x)
        if l1_rate > 0:
            act_grads = act_grads + l1_rate * ctx.norms[selection.columns]
        act_grads = act_grads * grad_loss

        by_latent = _EntriesByLatent.of(selection.columns, W_dec.shape[0])
        acts = ctx.acts * grad_loss
        W_dec_grad = by_latent.sum(ctx.bags, per_bag, acts)
        W_enc_grad = by_latent.sum(selection.rows, encoder_in, act_grads.to(encoder_in.dtype))
        b_enc_grad = torch.zeros_like(W_enc[0]).index_add_(0, selection.columns, act_grads)
        if l1_rate > 0:
            total = torch.zeros_like(b_enc_grad).index_add_(0, selection.columns, acts)
            W_dec_grad += (l1_rate * total / ctx.norms.clamp(min=1e-30))[:, None] * W_dec
        with torch.autocast(x.device.type, enabled=ctx.autocast):
            for group in aux.groups:
                group.add_gradients(W_enc_grad, b_enc_grad, W_dec_grad, encoder_in, W_dec, grad_loss)
            W_skip_grad = None
            if W_skip is not None:
                W_skip_grad = (base_grad.T @ x.to(base_grad.dtype)).to(W_skip.dtype)
        b_dec_grad = base_grad.sum(dim=0)
        if objective.subtract_b_dec:
            b_dec_grad = b_dec_grad - W_enc @ b_enc_grad
        return (W_enc_grad.T, b_enc_grad, W_dec_grad, b_dec_grad, W_skip_grad, *[None] * 6)


def _encode(
    encoder_in: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, step: SparseStep
) -> torch.Tensor:
    shape = (len(encoder_in), W_enc.shape[1])
    autocast = torch.is_autocast_enabled(encoder_in.device.type)
    out = None if autocast else step.scratch("hidden_pre", encoder_in, shape, W_enc.dtype)
    return torch.addmm(b_enc, encoder_in, W_enc, out=out)


class _Decoded(NamedTuple):
    residuals: torch.Tensor
    """`[B, n_levels, d_out]`, prediction minus target"""
    level_losses: torch.Tensor
    """`[n_levels]`"""
    bags: torch.Tensor
    """`[n]`: row · n_levels + level of each entry"""
    offsets: torch.Tensor
    """`[B · n_levels]`: where each bag begins"""


def _nested_residuals(
    selection: Selection,
    acts: torch.Tensor,
    levels: torch.Tensor,
    W_dec: torch.Tensor,
    base: torch.Tensor,
    y: torch.Tensor,
    objective: NestedObjective,
) -> _Decoded:
    n_rows, n_levels, d_out = len(y), len(objective.widths), W_dec.shape[1]
    bags = selection.rows * n_levels + levels[selection.columns]
    offsets = torch.searchsorted(bags, torch.arange(n_rows * n_levels + 1, device=bags.device))
    residuals = W_dec.new_empty(n_rows, n_levels, d_out)
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    level_losses = W_dec.new_zeros(n_levels, dtype=wide)
    start_from = (base - y).expand(n_rows, d_out)
    chunk = n_rows
    if W_dec.device.type == "cpu":
        chunk = max(1, _CPU_DECODE_VALUES // (n_levels * d_out))
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        bag_range = offsets[start * n_levels : stop * n_levels + 1]
        if chunk == n_rows:
            columns, weights = selection.columns, acts
        else:
            first, last = int(bag_range[0]), int(bag_range[-1])
            columns, weights = selection.columns[first:last], acts[first:last]
            bag_range = bag_range - first
        parts = F.embedding_bag(
            columns,
            W_dec,
            bag_range,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        ).view(-1, n_levels, d_out)
        out, running = residuals[start:stop], start_from[start:stop]
        for level in range(n_levels):
            running = torch.add(running, parts[:, level], out=out[:, level])
        level_losses += out.to(level_losses.dtype).pow(2).sum(dim=(0, 2))
    return _Decoded(residuals, level_losses / n_rows, bags, offsets[:-1])


def _output_grads(residuals: torch.Tensor, level_weights: torch.Tensor) -> torch.Tensor:
    """Gradient of the loss by what the latents of each level add: `[B, n_levels, d_out]`.

    A latent of level l is in all levels m ≥ l, so its gradient is theirs together. Overwrites `residuals`.
    """
    scale = level_weights * (2 / len(residuals))
    n_levels = residuals.shape[1]
    residuals[:, -1] *= scale[-1]
    for level in range(n_levels - 2, -1, -1):
        residuals[:, level].mul_(scale[level]).add_(residuals[:, level + 1])
    return residuals


class _EntriesByLatent(NamedTuple):
    """The kept entries sorted by latent."""

    order: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, columns: torch.Tensor, d_sae: int) -> _EntriesByLatent:
        by_column, order = torch.sort(columns, stable=True)
        bounds = torch.arange(d_sae + 1, device=columns.device)
        return cls(order, torch.searchsorted(by_column, bounds))

    def sum(self, index: torch.Tensor, table: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """For each latent, the sum over its entries e of factors[e] · table[index[e]]: `[d_sae, d]`."""
        return F.embedding_bag(
            index[self.order],
            table,
            self.offsets,
            mode="sum",
            per_sample_weights=factors[self.order],
            include_last_offset=True,
        )


class _AuxGroup(NamedTuple):
    """Dead latents that share a residual, and what their gradients need."""

    columns: torch.Tensor
    """`[n_dead]`"""
    acts: torch.Tensor
    """`[B, n_dead]`, 0 where not chosen"""
    chosen: torch.Tensor | None
    """mask of the same shape, None where all are"""
    error_grad: torch.Tensor
    """`[B, d_out]`, gradient of the loss by the dead latents' prediction"""

    def add_gradients(
        self,
        W_enc_grad: torch.Tensor,
        b_enc_grad: torch.Tensor,
        W_dec_grad: torch.Tensor,
        encoder_in: torch.Tensor,
        W_dec: torch.Tensor,
        grad_loss: torch.Tensor,
    ) -> None:
        error_grad = self.error_grad * grad_loss
        act_grads = error_grad @ W_dec[self.columns].T
        if self.chosen is not None:
            act_grads = act_grads * self.chosen
        for grad, update in (
            (W_dec_grad, self.acts.T @ error_grad),
            (W_enc_grad, act_grads.T @ encoder_in.to(act_grads.dtype)),
            (b_enc_grad, act_grads.sum(dim=0)),
        ):
            grad.index_add_(0, self.columns, update.to(grad.dtype))


class _Aux(NamedTuple):
    loss: torch.Tensor
    groups: list[_AuxGroup]


def _aux_forward(
    hidden_pre: torch.Tensor,
    W_dec: torch.Tensor,
    residuals: torch.Tensor,
    norms: torch.Tensor | None,
    objective: NestedObjective,
    dead_columns: torch.Tensor | None,
) -> _Aux:
    loss, groups = W_dec.new_zeros(()), []
    if dead_columns is None or len(dead_columns) == 0:
        return _Aux(loss, groups)
    budget = max(W_dec.shape[1] // 2, 1)
    if objective.aux_per_level:
        bounds = torch.searchsorted(
            dead_columns, torch.tensor([0, *objective.widths], device=dead_columns.device)
        ).tolist()
        level_columns = [dead_columns[a:b] for a, b in pairwise(bounds)]
    else:
        level_columns = [dead_columns[:0]] * (len(objective.widths) - 1) + [dead_columns]
    for level, columns in enumerate(level_columns):
        if len(columns) == 0:
            continue
        acts = hidden_pre.index_select(1, columns).to(W_dec.dtype)
        chosen = None
        if len(columns) > budget:
            ranking = acts if norms is None else acts * norms[columns]
            top = ranking.topk(budget, dim=-1, sorted=False).indices
            chosen = torch.zeros_like(acts, dtype=torch.bool).scatter_(-1, top, True)
            acts = acts * chosen
        error = (acts @ W_dec[columns]).to(W_dec.dtype) + residuals[:, level]
        scale = objective.aux_coefficient * min(len(columns) / budget, 1.0)
        loss = loss + scale * error.pow(2).sum() / len(error)
        groups.append(_AuxGroup(columns, acts, chosen, error * (2 * scale / len(error))))
    return _Aux(loss, groups)


def _coo(index: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False, is_coalesced=True)
