"""SAELens's trainer in each of many processes, training one dictionary together.

`parallelize` changes a trainer from outside, before it trains; its loop, its optimizer and its schedules run
unchanged in every process, on the same numbers:

1. the step knows its group: one selection, one loss, one set of dead latents for the whole batch;
2. the gradients are those of the whole batch, and clipped by their whole norm;
3. what fires is counted over the whole batch, and activations are scaled by all processes' rows;
4. only the first process writes. All evaluate, each its part of the held-out prompts (see
   `evaluation.evaluator`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from saelens_matryoshka.architectures import MatryoshkaTraining
from saelens_matryoshka.architectures.calibration import RecentRows
from saelens_matryoshka.ops import SparseStep
from saelens_matryoshka.ops.group import Over
from saelens_matryoshka.parallel.dictionary import (
    ShardedStep,
    join_gradients,
    whole,
)
from saelens_matryoshka.parallel.processes import Processes
from saelens_matryoshka.scaling import FiniteScaler

# What SAELens's trainer clips the norm of the gradients to.
_MAX_NORM = 1.0


def parallelize(trainer: SAETrainer[Any, Any], group: Processes) -> None:
    """Have a trainer train together with those of the group's other processes.

    Args:
        trainer: Of one of our architectures, with its optimizer; its dictionary is the same in all processes,
            or has been cut by `shard`. Its `train_batch_size_samples` is that of the whole batch, of which
            its data provider gives this process's rows.
        group: The processes.
    """
    sae: MatryoshkaTraining = trainer.sae
    sae.group = group
    sae.step_fn = SparseStep(group) if group.shards == 1 else ShardedStep(group)
    trainer.activation_scaler = _ScalerOfAll(trainer.activation_scaler, sae, group)
    if group.row_blocks > 1:
        _divide_recent_rows(sae, group)
    if group.shards > 1:
        trainer.data_provider = GatheredRows(trainer.data_provider, group, "latents")
        join_gradients(sae.named_parameters(), group, _MAX_NORM)
    elif group.row_blocks > 1:
        _average_gradients(sae, group)
    _count_over_all(trainer, group)
    trainer.save_checkpoint = writing(trainer, group, trainer.save_checkpoint)  # type: ignore[method-assign]


# ---- gradients


class _TrainingForward(nn.Module):
    """The training forward pass as the forward of a module, which is what DDP wraps."""

    def __init__(self, sae: MatryoshkaTraining) -> None:
        super().__init__()
        self.sae = sae
        self._pass = sae.training_forward_pass

    @override
    def forward(self, step_input: TrainStepInput) -> TrainStepOutput:
        return self._pass(step_input)


def _average_gradients(sae: MatryoshkaTraining, group: Processes) -> None:
    device = sae.W_enc.device
    with warnings.catch_warnings():
        # the name that replaces broadcast_buffers is not known to older versions
        warnings.simplefilter("ignore", FutureWarning)
        forward = DistributedDataParallel(
            _TrainingForward(sae),
            device_ids=[device] if device.type == "cuda" else None,
            process_group=group.process_group("rows"),
            broadcast_buffers=False,  # every process computes the same ones
            gradient_as_bucket_view=True,
        )

    forward.register_comm_hook(  # a lambda, because torch refuses annotations that are text
        group.process_group("rows"),
        lambda rows, bucket: _average_each(bucket.buffer(), bucket.gradients(), rows),
    )

    def training_forward_pass(step_input: TrainStepInput) -> TrainStepOutput:
        return forward(step_input)

    sae.training_forward_pass = training_forward_pass  # type: ignore[method-assign]


def _average_each(
    bucket: torch.Tensor, gradients: list[torch.Tensor], rows: dist.ProcessGroup
) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients in one of DDP's buckets, parameter by parameter.

    DDP packs its buckets anew after the first step. From three processes on, the order in which the values of
    a parameter are added depends on where it lies, so that a resumed run would differ in the last bits.
    """
    for gradient in gradients:
        dist.all_reduce(gradient.div_(rows.size()), group=rows)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future(
        devices=[bucket.device] if bucket.is_cuda else None
    )
    done.set_result(bucket)
    return done


# ---- data


class GatheredRows(Iterator[torch.Tensor]):
    """Batches of the rows that several processes' providers give, the same ones for each of them."""

    def __init__(self, own: DataProvider, group: Processes, over: Over) -> None:
        self._own, self._group = own, group
        self._over: Over = over

    def __next__(self) -> torch.Tensor:
        rows = next(self._own).to(self._group.device)
        return torch.cat(self._group.gather(rows, self._over))

    def paused(self) -> AbstractContextManager[None]:
        """Keep a prefetcher's thread from running the language model meanwhile, if there is one."""
        return getattr(self._own, "paused", nullcontext)()


class _ScalerOfAll(FiniteScaler):
    """Estimates its factors from the rows of all processes."""

    def __init__(self, own: ActivationScaler, sae: MatryoshkaTraining, group: Processes) -> None:
        super().__init__(own, sae)
        self._group = group

    @override
    def _batches(self, provider: DataProvider) -> Iterator[torch.Tensor]:
        # the provider has gathered those of the shards
        return GatheredRows(super()._batches(provider), self._group, "rows")


# ---- statistics


def _count_over_all(trainer: SAETrainer[Any, Any], group: Processes) -> None:
    """Count samples and firings over the whole batch, after every step of the trainer."""
    step = trainer.step

    def step_of_all(batch: torch.Tensor) -> TrainStepOutput:
        so_far = trainer.act_freq_scores
        trainer.act_freq_scores = torch.zeros_like(so_far)
        try:
            output = step(batch)
            fired = group.sum(trainer.act_freq_scores, "all")
        finally:
            trainer.act_freq_scores = so_far
        so_far += fired
        n_rows = len(batch) * group.row_blocks
        # of the whole batch, in place of what SAELens logs of the rows it sees; unknown if it was left out
        output.metrics.setdefault("l0", fired.sum() / n_rows)
        output.metrics["explained_variance"] = lambda: 1 - output.metrics["fvu"]()  # type: ignore[operator]
        trainer.n_forward_passes_since_fired[fired > 0] = 0
        trainer.n_training_samples += n_rows - len(batch)
        return output

    trainer.step = step_of_all  # type: ignore[method-assign]


# ---- writing


def writing(
    trainer: SAETrainer[Any, Any], group: Processes, write: Callable[..., Any], *, optimizer: bool = True
) -> Callable[..., Any]:
    """`write` to be called by all processes, and done by the first.

    Meanwhile, that one has what all of them have together: the whole dictionary, its optimizer state (if
    wanted) and the rows its threshold is calibrated by. The others answer what it asks for, and return None.
    """

    @functools.wraps(write)
    def write_once(*args: Any, **kwargs: Any) -> Any:
        if group.is_writing:
            return write(*args, **kwargs)
        sae: MatryoshkaTraining = trainer.sae
        sae.finite.settle()
        with sae.keeping_threshold():
            sae.calibrate_threshold()  # here, where all take part
            with whole(trainer, group, optimizer=optimizer), _recent_rows_of_all(sae, group):
                if group.rank != 0:
                    group.answer()
                    return None
                group.is_writing = True
                try:
                    return write(*args, **kwargs)
                finally:
                    group.is_writing = False
                    group.ask_no_more()

    return write_once


@contextmanager
def _recent_rows_of_all(sae: MatryoshkaTraining, group: Processes) -> Iterator[None]:
    own = sae.recent
    if group.row_blocks > 1 and own.count():
        lengths = [len(batch) for batch in own.batches()]
        blocks = [rows.split(lengths) for rows in group.gather(own.rows(), "rows")]
        sae.recent = RecentRows(map(torch.cat, zip(*blocks, strict=True)))
    try:
        yield
    finally:
        sae.recent = own


def _divide_recent_rows(sae: MatryoshkaTraining, group: Processes) -> None:
    """Of the rows a checkpoint has of whole batches, keep this process's block; all are of one length."""
    n = group.row_blocks
    sae.recent = RecentRows(
        batch[: len(batch) // n * n].tensor_split(n)[group.row_block] for batch in sae.recent.batches()
    )
