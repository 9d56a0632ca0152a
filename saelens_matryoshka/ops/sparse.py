"""The nested step at a cost that follows the active latents: one dense product, the encoder's.

The same function as `saelens_matryoshka.ops.reference`, to rounding. With n ≈ k·B kept entries:

1. the encoder's product, without autograd; the selection dismisses all but a few entries in one pass;
2. every (row, level) is a *bag* of entries. The entries are in row-major order and the latents of a level
   are neighbours, so one pass over the bags decodes all levels, a running sum over levels makes the
   predictions, and the cost does not depend on the number of levels;
3. the gradient of level l's latents is the sum over the levels m ≥ l of their residuals, a running sum
   from the other end. With it, the gradients of the entries, of the decoder rows and of the encoder
   columns are again bags: of entries per latent this time;
4. the auxiliary loss is computed on the dead columns alone.

Processes that share the rows or the latents (a `Group`) each do this for their block. Losses, predictions and
the gradient of what every block contains are summed over blocks; all else stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from saelens_matryoshka.ops.bags import bag_sums, takes_memory
from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.group import ALONE, Group
from saelens_matryoshka.ops.order import stable_order
from saelens_matryoshka.ops.selection import Selection, largest_of_rows, select_batch, select_token
from saelens_matryoshka.ops.step import NestedObjective, NestedStep, NestedWeights
from saelens_matryoshka.widths import latent_levels

# Values of [rows, levels, d_out] decoded at a time on a CPU, so that they stay in its cache.
CPU_DECODE_VALUES = 1 << 20
# The auxiliary loss is computed entry by entry where fewer than one in so many of the dead latents is chosen
SPARSE_AUX = 12


class SparseStep:
    """The step as a callable that remembers, from batch to batch, where the candidates begin.

    What it remembers changes the speed, never the result.

    Args:
        group: Who shares the batch and the dictionary. The losses of the step are then those of the whole
            batch, and the gradients those of the mean over this process's rows, of its latents.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self.group = group
        self._last_threshold: torch.Tensor | None = None
        self._scratch: dict[str, torch.Tensor] = {}
        self._spare: list[torch.Tensor] = []
        # weakly, so that what gets the address of memory that was freed is not taken for it
        self._lent: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()

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
        self._last_threshold = chosen.batch_threshold
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
        return SparseStep(self.group)

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseStep, (self.group,)

    def share_memory(self, other: SparseStep) -> None:
        """Use the buffers of another step, of a dictionary of the same sizes with which it takes turns."""
        self._scratch, self._spare, self._lent = other._scratch, other._spare, other._lent

    def scratch(
        self, name: str, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """A buffer kept from step to step on a CPU, where fresh memory costs as much as a pass over it."""
        if device.type != "cpu":
            return None
        buffer = self._scratch.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            buffer = self._scratch[name] = torch.empty(shape, dtype=dtype)
        return buffer

    def take(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for what outlives the step: what `give_back` got, if it fits."""
        for place, spare in enumerate(self._spare):
            if spare.shape == shape and spare.dtype == like.dtype:
                return self._spare.pop(place)
        buffer = like.new_empty(shape)
        if buffer.device.type == "cpu":
            self._lent[buffer.data_ptr()] = buffer.untyped_storage()
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Keep what was taken on a CPU for the next step, once nobody else has it. Ignores other tensors."""
        if self._lent.get(buffer.data_ptr()) is buffer.untyped_storage():
            self._spare.append(buffer)


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
        group = step.group
        encoder_in = x - b_dec if objective.subtract_b_dec else x
        encoder = Encoder(encoder_in, W_enc, b_enc, dead_columns, step.scratch)
        norms = W_dec.norm(dim=-1)
        selection_norms = norms if objective.rescale_by_decoder_norm else None
        if objective.selection == "token":
            selection = select_token(encoder, selection_norms, int(objective.k), group=group)
        else:
            selection = select_batch(
                encoder, selection_norms, objective.k, last_threshold=step._last_threshold, group=group
            )
        acts = selection.pre.to(W_dec.dtype)
        base = b_dec if W_skip is None else torch.addmm(b_dec, x, W_skip.T).to(b_dec.dtype)
        any_dead = dead_columns is not None and group.count(len(dead_columns), "latents") > 0
        decoded = _decode(
            selection,
            acts,
            W_dec,
            base,
            y,
            objective,
            group,
            output_grads=step.take(W_dec, (len(x), len(objective.widths), W_dec.shape[1])),
            all_residuals=any_dead and objective.aux_per_level,
        )
        aux = _Aux(W_dec.new_zeros(()), [])
        if any_dead:
            dead_pre = encoder.dead_pre()
            assert dead_columns is not None
            if dead_pre is None:
                dead_pre = W_dec.new_zeros(len(x), 0)
            aux = _aux_forward(
                dead_pre, W_dec, decoded.residuals, selection_norms, objective, dead_columns, group
            )
        l1_loss = (acts * norms[selection.columns]).sum() * (objective.l1_coefficient / len(x))
        l1_loss = group.sum(l1_loss, "latents")
        level_losses, aux_loss, l1_loss = _mean_over_rows(group, decoded.level_losses, aux.loss, l1_loss)
        box.append(_Parts(level_losses, aux_loss, l1_loss, y + decoded.residuals[:, -1], selection))
        ctx.save_for_backward(W_enc, W_dec, W_skip, x, encoder_in)
        ctx.selection, ctx.acts, ctx.norms, ctx.bags = selection, acts, norms, decoded.bags
        ctx.output_grads, ctx.aux, ctx.objective = decoded.output_grads, aux, objective
        ctx.step = step
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        return (level_losses.new_tensor(objective.level_weights) * level_losses).sum() + aux_loss + l1_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        W_enc, W_dec, W_skip, x, encoder_in = ctx.saved_tensors
        selection, objective, aux = ctx.selection, ctx.objective, ctx.aux
        d_out = W_dec.shape[1]
        output_grads = ctx.output_grads  # [B, n_levels, d_out]
        ctx.output_grads = ctx.aux = None  # free them now: the trainer holds on to the loss
        per_bag = output_grads.view(-1, d_out)
        base_grad = output_grads[:, 0] * grad_loss  # every level contains the base

        # All in the order of the latents: the rows of the small tables are then read from the cache, and
        # those of the large ones in sequence.
        entries = _EntriesByLatent.of(selection.columns, W_dec.shape[0])
        bags, acts = ctx.bags[entries.order], ctx.acts[entries.order] * grad_loss
        act_grads = entries.dot(bags, per_bag, W_dec)
        l1_rate = objective.l1_coefficient / len(x)
        if l1_rate > 0:
            act_grads = act_grads + l1_rate * ctx.norms[entries.columns]
        act_grads = act_grads * grad_loss

        W_dec_grad = entries.sum(bags, per_bag, acts, take=ctx.step.take)
        rows = selection.rows[entries.order]
        W_enc_grad = entries.sum(rows, encoder_in, act_grads.to(encoder_in.dtype), take=ctx.step.take)
        b_enc_grad = entries.total(act_grads)
        if l1_rate > 0:
            rate = l1_rate * entries.total(acts) / ctx.norms.clamp(min=1e-30)
            W_dec_grad += rate.to(W_dec.dtype)[:, None] * W_dec
        with torch.autocast(x.device.type, enabled=ctx.autocast):
            for part in aux.parts:
                updates = part.gradients(encoder_in, W_dec, grad_loss)
                for grad, update in zip((W_enc_grad, b_enc_grad, W_dec_grad), updates, strict=True):
                    grad.index_add_(0, part.columns, update.to(grad.dtype))
            W_skip_grad = None
            if W_skip is not None:
                W_skip_grad = (base_grad.T @ x.to(base_grad.dtype)).to(W_skip.dtype)
        ctx.step.give_back(output_grads)
        b_dec_grad = base_grad.sum(dim=0)
        b_enc_grad = b_enc_grad.to(W_enc.dtype)
        if objective.subtract_b_dec:
            b_dec_grad = b_dec_grad - ctx.step.group.sum(W_enc @ b_enc_grad, "latents")
        return (W_enc_grad.T, b_enc_grad, W_dec_grad, b_dec_grad, W_skip_grad, *[None] * 6)


class _Decoded(NamedTuple):
    level_losses: torch.Tensor
    """`[n_levels]`"""
    residuals: torch.Tensor
    """`[B, 1, d_out]`, the whole dictionary's prediction minus target; `[B, n_levels, d_out]` if asked"""
    output_grads: torch.Tensor
    """`[B, n_levels, d_out]`, gradient of the loss by what the latents of each level add up to"""
    bags: torch.Tensor
    """`[n]`: row · n_levels + level of each entry"""


def _decode(
    selection: Selection,
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    base: torch.Tensor,
    y: torch.Tensor,
    objective: NestedObjective,
    group: Group,
    *,
    output_grads: torch.Tensor,
    all_residuals: bool,
) -> _Decoded:
    """All levels from one decoding, with their losses and gradients, these put into `output_grads`."""
    n_rows, n_levels, d_out = len(y), len(objective.widths), W_dec.shape[1]
    levels = latent_levels(objective.widths, device=W_dec.device)
    bags = selection.rows * n_levels + levels[selection.columns]
    offsets = torch.searchsorted(bags, torch.arange(n_rows * n_levels + 1, device=bags.device))
    level_losses = W_dec.new_zeros(n_levels, dtype=torch.promote_types(W_dec.dtype, torch.float32))
    level_weights = level_losses.new_tensor(objective.level_weights)
    residuals = W_dec.new_empty(n_rows, n_levels if all_residuals else 1, d_out)
    start_from = (base - y).expand(n_rows, d_out)
    on_cpu = W_dec.device.type == "cpu"
    chunk = max(1, CPU_DECODE_VALUES // (n_levels * d_out)) if on_cpu else n_rows
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        chunk_offsets = offsets[start * n_levels : stop * n_levels + 1]
        columns, weights = selection.columns, acts
        if chunk < n_rows:
            first, last = int(chunk_offsets[0]), int(chunk_offsets[-1])
            columns, weights = columns[first:last], weights[first:last]
            chunk_offsets = chunk_offsets - first
        parts = bag_sums(columns, W_dec, chunk_offsets, weights).view(-1, n_levels, d_out)
        parts = group.sum(parts, "latents")
        out, running = output_grads[start:stop], start_from[start:stop]
        for level in range(n_levels):
            running = torch.add(running, parts[:, level], out=out[:, level])
        level_losses += out.to(level_losses.dtype).pow(2).sum(dim=(0, 2))
        residuals[start:stop] = out if all_residuals else out[:, -1:]
        # A latent of level l is in all levels m ≥ l, so its gradient is theirs together.
        out *= (level_weights * (2 / n_rows)).to(out.dtype)[:, None]
        for level in range(n_levels - 2, -1, -1):
            out[:, level] += out[:, level + 1]
    return _Decoded(level_losses / n_rows, residuals, output_grads, bags)


def _mean_over_rows(group: Group, level_losses: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """The losses of the whole batch, from those of the blocks of rows."""
    if group.row_blocks == 1:
        return [level_losses, *others]
    losses = torch.cat([level_losses, torch.stack(others).to(level_losses.dtype)])
    losses = group.sum(losses, "rows") / group.row_blocks
    return [losses[: len(level_losses)], *losses[len(level_losses) :]]


class _EntriesByLatent(NamedTuple):
    """The kept entries, sorted by latent."""

    order: torch.Tensor
    """`[n]`: where each entry was before sorting"""
    columns: torch.Tensor
    """`[n]`: latent of each entry"""
    offsets: torch.Tensor
    """`[d_sae + 1]`: where the entries of each latent begin"""

    @classmethod
    def of(cls, columns: torch.Tensor, d_sae: int) -> _EntriesByLatent:
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
        take: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """For each latent, the sum over its entries e of factors[e] · table[index[e]]: `[d_sae, d]`.

        `take` gives the memory for it, as `SparseStep.take`.
        """
        out = None
        if take is not None and takes_memory(table):
            out = take(table, (len(self.offsets) - 1, table.shape[1]))
        return bag_sums(index, table, self.offsets, factors, out=out)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each latent's values: `[d_sae]`, at least float32, since a latent may have thousands."""
        wide = torch.promote_types(values.dtype, torch.float32)
        sums = torch.zeros(len(self.offsets) - 1, dtype=wide, device=values.device)
        return sums.index_add_(0, self.columns, values.to(wide))

    def dot(self, index: torch.Tensor, table: torch.Tensor, by_latent: torch.Tensor) -> torch.Tensor:
        """For each entry e, table[index[e]] · by_latent[its latent]: `[n]`."""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            by_latent, table, index, self.offsets[:-1], self.columns, 0, -1
        )


class _DenseAux(NamedTuple):
    """Dead latents that learn a residual, most of them in every row, and what their gradients need."""

    columns: torch.Tensor
    """`[n_dead]`"""
    acts: torch.Tensor
    """`[B, n_dead]`, 0 where not chosen"""
    chosen: torch.Tensor | None
    """mask of the same shape, None where all are"""
    error_grad: torch.Tensor
    """`[B, d_out]`, gradient of the loss by the dead latents' prediction"""

    def gradients(
        self, encoder_in: torch.Tensor, W_dec: torch.Tensor, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the dead latents' W_enc (by latent), b_enc and W_dec."""
        error_grad = self.error_grad * grad_loss
        act_grads = error_grad @ W_dec[self.columns].T
        if self.chosen is not None:
            act_grads = act_grads * self.chosen
        wide = torch.promote_types(act_grads.dtype, torch.float32)
        return (
            act_grads.T @ encoder_in.to(act_grads.dtype),
            act_grads.sum(dim=0, dtype=wide),
            self.acts.T @ error_grad,
        )


class _SparseAux(NamedTuple):
    """The same where few of the dead latents are chosen in each row: bags of entries, as for those alive."""

    columns: torch.Tensor
    """`[n_dead]`"""
    rows: torch.Tensor
    """`[n]` row of each chosen entry, increasing"""
    places: torch.Tensor
    """`[n]` place of its latent in `columns`"""
    acts: torch.Tensor
    """`[n]`"""
    error_grad: torch.Tensor
    """`[B, d_out]`, as above"""

    def gradients(
        self, encoder_in: torch.Tensor, W_dec: torch.Tensor, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the dead latents' W_enc (by latent), b_enc and W_dec."""
        entries = _EntriesByLatent.of(self.places, len(self.columns))
        rows, acts = self.rows[entries.order], self.acts[entries.order] * grad_loss
        act_grads = entries.dot(rows, self.error_grad, W_dec[self.columns]) * grad_loss
        return (
            entries.sum(rows, encoder_in, act_grads.to(encoder_in.dtype)),
            entries.total(act_grads),
            entries.sum(rows, self.error_grad, acts),
        )


class _Aux(NamedTuple):
    loss: torch.Tensor
    parts: list[_DenseAux | _SparseAux]


def _aux_forward(
    dead_pre: torch.Tensor,
    W_dec: torch.Tensor,
    residuals: torch.Tensor,
    norms: torch.Tensor | None,
    objective: NestedObjective,
    dead_columns: torch.Tensor,
    group: Group,
) -> _Aux:
    loss, parts = W_dec.new_zeros(()), []
    budget = objective.aux_budget(W_dec.shape[1])
    if objective.aux_per_level:
        bounds = torch.searchsorted(
            dead_columns, torch.tensor([0, *objective.widths], device=dead_columns.device)
        ).tolist()
        level_columns = [dead_columns[a:b] for a, b in pairwise(bounds)]
    else:
        level_columns = [dead_columns]
    level_pre = dead_pre.split([len(columns) for columns in level_columns], dim=1)
    for level, (columns, pre) in enumerate(zip(level_columns, level_pre, strict=True)):
        n_dead = group.count(len(columns), "latents")
        if n_dead == 0:
            continue
        acts, chosen = pre.to(W_dec.dtype), None
        if n_dead > budget:
            ranking = acts if norms is None else acts * norms[columns]
            chosen = largest_of_rows(ranking, budget, group)
        is_sparse = chosen is not None and n_dead > SPARSE_AUX * budget
        if is_sparse:
            assert chosen is not None
            rows, places = chosen.nonzero(as_tuple=True)
            acts = acts[rows, places]
            offsets = torch.searchsorted(rows, torch.arange(len(chosen) + 1, device=rows.device))
            prediction = bag_sums(columns[places], W_dec, offsets, acts)
        else:
            acts = acts if chosen is None else acts * chosen
            prediction = acts @ W_dec[columns]
        error = group.sum(prediction, "latents").to(W_dec.dtype) + residuals[:, level]
        scale = objective.aux_coefficient * min(n_dead / budget, 1.0)
        loss = loss + scale * error.pow(2).sum() / len(error)
        error_grad = error * (2 * scale / len(error))
        parts.append(
            _SparseAux(columns, rows, places, acts, error_grad)
            if is_sparse
            else _DenseAux(columns, acts, chosen, error_grad)
        )
    return _Aux(loss, parts)


def _coo(index: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False, is_coalesced=True)
