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

(Where a GPU multiplies faster than it gathers, dense products stand for the bags: see `ops.entries`. Where a
CPU multiplies bfloat16 much faster than float32, a product in bfloat16 says which entries to compute, and the
encoder's is not made: see `ops.screen`.)

Processes that share the rows or the latents (a `Group`) each do this for their block. Losses, predictions and
the gradient of what every block contains are summed over blocks; all else stays where it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from saelens_matryoshka.ops import screen
from saelens_matryoshka.ops.bags import bag_sums, row_dots
from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.entries import ByLatent, Entries, kept_entries, sum_by_latent
from saelens_matryoshka.ops.group import ALONE, Group
from saelens_matryoshka.ops.levels import Levels
from saelens_matryoshka.ops.selection import Selection, largest_of_rows, select_batch, select_token
from saelens_matryoshka.ops.step import NestedObjective, NestedStep, NestedWeights

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
        self._levels: tuple[Any, Levels] | None = None
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
        box: list[_Parts] = []
        loss: Any = _NestedLoss.apply(*weights, x, y, objective, dead_columns, self, box)
        (parts,) = box
        chosen = parts.selection
        self._last_threshold = _known_threshold(chosen.batch_threshold, self._last_threshold)
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

    def levels(self, objective: NestedObjective, W_dec: torch.Tensor) -> Levels:
        """The levels of an objective, on the device of `W_dec`."""
        key = (objective.widths, objective.level_weights, W_dec.device, W_dec.dtype)
        if self._levels is None or self._levels[0] != key:
            self._levels = key, Levels.of(objective, W_dec)
        return self._levels[1]

    def share_memory(self, other: SparseStep) -> None:
        """Use the buffers of another step, of a dictionary of the same sizes with which it takes turns."""
        self._scratch, self._spare, self._lent = other._scratch, other._spare, other._lent

    def scratch(
        self, name: str, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """A buffer kept from step to step on a CPU, where fresh memory costs as much as a pass over it.

        Of fewer rows than it has, as the last block of a batch may be, it is the first ones.
        """
        if device.type != "cpu":
            return None
        n_rows, *row = shape
        buffer = self._scratch.get(name)
        if buffer is None or len(buffer) < n_rows or [*buffer.shape[1:]] != row or buffer.dtype != dtype:
            buffer = self._scratch[name] = torch.empty(shape, dtype=dtype)
        return buffer[:n_rows]

    def take(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for what outlives the step: on a CPU what `give_back` got, if it fits."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        for place, spare in enumerate(self._spare):
            if spare.shape == shape and spare.dtype == like.dtype:
                return self._spare.pop(place)
        buffer = like.new_empty(shape)
        self._lent[buffer.data_ptr()] = buffer.untyped_storage()
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Keep what was taken on a CPU for the next step, once nobody else has it. Ignores other tensors."""
        if self._lent.get(buffer.data_ptr()) is buffer.untyped_storage():
            self._spare.append(buffer)


def _known_threshold(found: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """The last threshold above 0, without waiting for a GPU.

    It is 0 where no score was kept, as of a batch with NaN, and would let half of the next batch's through.
    """
    return found if before is None else torch.where(found > 0, found, before.to(found.device))


class _Parts(NamedTuple):
    level_losses: torch.Tensor
    aux_loss: torch.Tensor
    l1_loss: torch.Tensor
    prediction: torch.Tensor
    selection: Selection


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
        screened = screen.pays(encoder_in, W_enc, objective)
        encoder = Encoder(encoder_in, W_enc, b_enc, dead_columns, step.scratch, screened=screened)
        norms = W_dec.norm(dim=-1)
        selection_norms = norms if objective.rescale_by_decoder_norm else None
        if objective.selection == "token":
            selection = select_token(encoder, selection_norms, int(objective.k), group=group)
        else:
            selection = select_batch(
                encoder, selection_norms, objective.k, last_threshold=step._last_threshold, group=group
            )
        dead_pre = encoder.dead_pre()
        del encoder  # and with it the product: on a GPU, the decoding can have its memory
        acts = selection.pre.to(W_dec.dtype)
        levels = step.levels(objective, W_dec)
        entries = kept_entries(selection, levels, len(x), W_dec)
        base = b_dec if W_skip is None else torch.addmm(b_dec, x, W_skip.T).to(b_dec.dtype)
        any_dead = dead_columns is not None and group.count(len(dead_columns), "latents") > 0
        decoded = _decode(
            entries,
            acts,
            W_dec,
            base,
            y,
            levels,
            group,
            output_grads=step.take(W_dec, (len(x), len(objective.widths), W_dec.shape[1])),
            all_residuals=any_dead and objective.aux_per_level,
        )
        aux = _Aux(W_dec.new_zeros(()), [])
        if any_dead:
            assert dead_columns is not None
            if dead_pre is None:
                dead_pre = W_dec.new_zeros(len(x), 0)
            aux = _aux_forward(
                dead_pre, W_dec, decoded.residuals, selection_norms, objective, levels, dead_columns, group
            )
        l1_loss = (acts * norms[selection.columns]).sum() * (objective.l1_coefficient / len(x))
        l1_loss = group.sum(l1_loss, "latents")
        level_losses, aux_loss, l1_loss = _mean_over_rows(group, decoded.level_losses, aux.loss, l1_loss)
        box.append(_Parts(level_losses, aux_loss, l1_loss, y + decoded.residuals[:, -1], selection))
        ctx.save_for_backward(W_enc, W_dec, W_skip, x, encoder_in)
        ctx.entries, ctx.acts, ctx.norms = entries, entries.order(acts), norms
        ctx.output_grads, ctx.aux, ctx.objective = decoded.output_grads, aux, objective
        ctx.step = step
        device = x.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return (levels.weight_tensor * level_losses).sum() + aux_loss + l1_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        W_enc, W_dec, W_skip, x, encoder_in = ctx.saved_tensors
        entries, objective, aux, take = ctx.entries, ctx.objective, ctx.aux, ctx.step.take
        output_grads = ctx.output_grads  # [B, n_levels, d_out]
        ctx.output_grads = ctx.aux = None  # free them now: the trainer holds on to the loss
        base_grad = output_grads[:, 0] * grad_loss  # every level contains the base

        acts = ctx.acts * grad_loss
        act_grads = entries.act_grads(output_grads, W_dec).to(acts.dtype)
        l1_rate = objective.l1_coefficient / len(x)
        if l1_rate > 0:
            act_grads = act_grads + l1_rate * ctx.norms[entries.columns]
        act_grads = act_grads * grad_loss

        W_dec_grad = entries.decoder_grad(acts, output_grads, take).to(W_dec.dtype)
        W_enc_grad = entries.encoder_grad(act_grads, encoder_in, take).to(W_enc.dtype)
        b_enc_grad = sum_by_latent(entries.columns, act_grads, len(W_dec))
        if l1_rate > 0:
            rate = l1_rate * sum_by_latent(entries.columns, acts, len(W_dec)) / ctx.norms.clamp(min=1e-30)
            W_dec_grad += rate.to(W_dec.dtype)[:, None] * W_dec
        autocast, dtype = ctx.autocast  # backward runs outside of it, where a GPU's dtype would be float16
        with torch.autocast(x.device.type, dtype, enabled=autocast):
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


def _decode(
    entries: Entries,
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    base: torch.Tensor,
    y: torch.Tensor,
    levels: Levels,
    group: Group,
    *,
    output_grads: torch.Tensor,
    all_residuals: bool,
) -> _Decoded:
    """All levels from one decoding, with their losses and gradients, these put into `output_grads`."""
    n_rows, n_levels, d_out = len(y), len(levels.widths), W_dec.shape[1]
    level_losses = torch.zeros_like(levels.weight_tensor)
    rates = [weight * 2 / n_rows for weight in levels.weights]
    residuals = W_dec.new_empty(n_rows, n_levels if all_residuals else 1, d_out)
    start_from = (base - y).expand(n_rows, d_out)
    on_cpu = W_dec.device.type == "cpu"
    chunk = max(1, CPU_DECODE_VALUES // (n_levels * d_out)) if on_cpu else n_rows
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        parts = entries.decode(acts, W_dec, start, stop)
        if group is not ALONE:
            parts = group.sum(parts.to(W_dec.dtype), "latents")
        out, running = output_grads[start:stop], start_from[start:stop]
        for level in range(n_levels):
            running = torch.add(running, parts[:, level], out=out[:, level])
        level_losses += torch.linalg.vector_norm(out, dim=-1, dtype=level_losses.dtype).square().sum(dim=0)
        residuals[start:stop] = out if all_residuals else out[:, -1:]
        # A latent of level l is in all levels m ≥ l, so its gradient is theirs together.
        out[:, -1] *= rates[-1]
        for level in range(n_levels - 2, -1, -1):
            torch.add(out[:, level + 1], out[:, level], alpha=rates[level], out=out[:, level])
    return _Decoded(level_losses / n_rows, residuals, output_grads)


def _mean_over_rows(group: Group, level_losses: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """The losses of the whole batch, from those of the blocks of rows."""
    if group.row_blocks == 1:
        return [level_losses, *others]
    losses = torch.cat([level_losses, torch.stack(others).to(level_losses.dtype)])
    losses = group.sum(losses, "rows") / group.row_blocks
    return [losses[: len(level_losses)], *losses[len(level_losses) :]]


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
        entries = ByLatent.of(self.places, len(self.columns))
        rows, acts = self.rows[entries.order], self.acts[entries.order] * grad_loss
        act_grads = row_dots(self.error_grad, rows, W_dec[self.columns], entries.columns) * grad_loss
        return (
            entries.sum(rows, encoder_in, act_grads),
            sum_by_latent(entries.columns, act_grads, len(self.columns)),
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
    levels: Levels,
    dead_columns: torch.Tensor,
    group: Group,
) -> _Aux:
    loss, parts = W_dec.new_zeros(()), []
    budget = objective.aux_budget(W_dec.shape[1])
    if objective.aux_per_level:
        bounds = torch.searchsorted(dead_columns, levels.bounds).tolist()
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
            prediction = bag_sums(columns[places], W_dec, offsets, acts, scattered=True)
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
