"""A dictionary in shards: a process has some of the latents and their optimizer state, nothing of the others.

Parameters become plain tensors of the shard's latents, so that everything elementwise (Adam, folding, the
biases' start) works as it does on the whole. What does not:

- the training step, to which `ShardedStep` gives the shard's part of widths and dead latents;
- the gradients, averaged over the copies of a shard if there are several, and clipped by the norm of all of
  them before SAELens clips, which then finds nothing to clip;
- saving, which `whole` makes a matter of one process, that for a while has the whole in host memory.

Not DTensor: it has no rule for the sparse bags the step is made of. Not FSDP2: it gathers whole parameters to
compute with them, every step, which is what a dictionary too large for one device cannot do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from sae_lens import SAETrainer
from torch import nn
from torch.utils.serialization import config as serialization

from saelens_matryoshka.architectures import MatryoshkaTraining
from saelens_matryoshka.ops import NestedObjective, NestedStep, NestedWeights, SparseStep
from saelens_matryoshka.parallel.processes import Processes

LATENT_DIM = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
"""The dimension of each parameter that runs over the latents"""


class ShardedStep:
    """The step on a shard of the dictionary, as a `NestedStepFn`.

    `feature_acts` and `hidden_pre` have the columns of the whole dictionary, of which only this shard's are
    ever not 0.
    """

    def __init__(self, group: Processes) -> None:
        self.group, self._step = group, SparseStep(group)

    def __call__(
        self,
        weights: NestedWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        objective: NestedObjective,
        *,
        dead: torch.Tensor | None,
    ) -> NestedStep:
        """Run one step. See `NestedStepFn` for the arguments; of them, the weights are the shard's."""
        group = self.group
        step = self._step(
            weights,
            x,
            y,
            dataclasses.replace(objective, widths=group.widths(objective.widths)),
            dead=None if dead is None else dead[group.latents()],
        )
        return step._replace(
            feature_acts=self._in_whole(step.feature_acts), hidden_pre=self._in_whole(step.hidden_pre)
        )

    def _in_whole(self, acts: torch.Tensor) -> torch.Tensor:
        rows, columns = acts.indices()
        index = torch.stack([rows, self.group.shard + columns * self.group.shards])
        shape = (acts.shape[0], self.group.d_sae)
        return torch.sparse_coo_tensor(index, acts.values(), shape, check_invariants=False, is_coalesced=True)


@torch.no_grad()
def shard(sae: MatryoshkaTraining, group: Processes, device: torch.device | str) -> None:
    """Keep a dictionary's own shard, on a device.

    Args:
        sae: The whole dictionary in the first process, which deals it out; in the others it may be on the
            meta device. It becomes the shard.
        group: Who shares it.
        device: Where the shard goes.
    """
    for name, parameter in list(sae.named_parameters()):
        own = _deal(name, parameter.data, group)
        setattr(sae, name, nn.Parameter(own.to(device)))
    for name, buffer in list(sae.named_buffers()):
        setattr(sae, name, _deal(name, buffer, group).to(device))
    sae.to(device)  # nothing is left to move, but SAELens notes where it is


def _deal(name: str, whole: torch.Tensor, group: Processes) -> torch.Tensor:
    """This process's part of the first one's tensor."""
    if name not in LATENT_DIM:
        found = torch.empty_like(whole, device=group.device)
        if group.rank == 0:
            found.copy_(whole)
        dist.broadcast(found, 0)
        return found
    by_latent = _by_latent(name, whole)
    shape = (group.widths([group.d_sae])[0], *by_latent.shape[1:])
    found = torch.empty(shape, dtype=whole.dtype, device=group.device)
    if group.rank == 0:
        found.copy_(by_latent[group.latents()])
        for index in range(1, group.shards):
            dist.send(by_latent[group.latents(index)].contiguous().to(group.device), index)
    elif group.row_block == 0:
        dist.recv(found, 0)
    if group.row_blocks > 1:  # the first copy has its shards, and gives them to the others
        dist.broadcast(found, group.shard, group=group.process_group("rows"))
    return _by_latent(name, found)


def _by_latent(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter with the latents first, if it has latents, or back again."""
    return tensor.T if LATENT_DIM.get(name) == 1 else tensor


def _part(name: str, whole: torch.Tensor, group: Processes) -> torch.Tensor:
    """This process's part of a parameter, or of what has its shape; a latent's values next to each other."""
    if name not in LATENT_DIM or whole.dim() == 0:
        return whole
    return _by_latent(
        name, _by_latent(name, whole)[group.latents()].clone(memory_format=torch.contiguous_format)
    )


# ---- gradients


def join_gradients(parameters: Iterable[tuple[str, nn.Parameter]], group: Processes, max_norm: float) -> None:
    """Average the gradients over blocks of rows, and scale them to at most this norm over all shards.

    Both as soon as all gradients are there. SAELens's trainer clips by the norm of the gradients it sees,
    which are a shard's. That is then at most the whole's, and so it leaves them alone.
    """
    named = dict(parameters)
    missing = set(named)

    def average() -> None:
        for name, parameter in named.items():
            assert parameter.grad is not None
            # What all shards have is averaged by all processes at once: to the same bits.
            over, copies = ("rows", group.row_blocks) if name in LATENT_DIM else ("all", group.size)
            total = group.sum(_by_latent(name, parameter.grad), over)
            parameter.grad = _by_latent(name, total.div_(copies))

    def clip() -> None:
        squares = torch.zeros((), device=group.device)
        for name, parameter in named.items():
            assert parameter.grad is not None
            square = parameter.grad.float().pow(2).sum()
            squares += square if name in LATENT_DIM else square / group.shards
        norm = group.sum(squares, "latents").sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for parameter in named.values():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    def arrived(name: str) -> None:
        missing.discard(name)
        if not missing:
            missing.update(named)
            if group.row_blocks > 1:
                average()
            clip()

    for name, parameter in named.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived(name))


# ---- the whole, for a while


@contextmanager
def whole(trainer: SAETrainer[Any, Any], group: Processes, *, optimizer: bool = True) -> Iterator[None]:
    """Within, the first process has the whole dictionary, in host memory, and its optimizer state if wanted.

    The shards of the first block of rows come one after the other, so that nowhere is more than the whole and
    one shard. The others have nothing to save meanwhile.
    """
    if group.shards == 1:
        yield
        return
    sae, state = trainer.sae, trainer.optimizer.state
    tensors: list[tuple[str, torch.Tensor]] = list(sae.named_parameters())
    if optimizer:
        for name, parameter in sae.named_parameters():
            moments = (value for value in state.get(parameter, {}).values() if value.dim() == parameter.dim())
            tensors += [(name, moment) for moment in moments]
    tensors += [("buffer", buffer) for _, buffer in sae.named_buffers()]
    parts = [tensor.data for _, tensor in tensors]
    for name, tensor in tensors:
        tensor.data = _gather(name, tensor.data, group)
    try:
        yield
    finally:
        for (_, tensor), part in zip(tensors, parts, strict=True):
            tensor.data = part


def _gather(name: str, part: torch.Tensor, group: Processes) -> torch.Tensor:
    """The whole tensor in host memory of the first process; of the others, their part."""
    if group.row_block > 0:
        return part
    if name not in LATENT_DIM:
        return part.cpu() if group.rank == 0 else part
    by_latent = _by_latent(name, part).contiguous()
    if group.rank != 0:
        dist.send(by_latent, 0)
        return part
    found = torch.empty((group.d_sae, *by_latent.shape[1:]), dtype=part.dtype)
    found[group.latents()] = by_latent.cpu()
    for index in range(1, group.shards):
        own = found[group.latents(index)]
        received = torch.empty(own.shape, dtype=part.dtype, device=part.device)
        dist.recv(received, index)
        own.copy_(received)
    return _by_latent(name, found)


def load_trainer_state(
    stock: Callable[..., None], trainer: SAETrainer[Any, Any], checkpoint_path: Any, *, group: Processes
) -> None:
    """`SAETrainer.load_trainer_state` of a checkpoint, which has the whole dictionary's, for a shard."""
    optimizer, device = trainer.optimizer, trainer.cfg.device
    names = [name for name, _ in trainer.sae.named_parameters()]
    load = optimizer.load_state_dict

    def load_part(state_dict: dict[str, Any]) -> None:
        state = {
            index: {key: _part(names[index], value, group) for key, value in values.items()}
            for index, values in state_dict["state"].items()
        }
        load({**state_dict, "state": state})

    trainer.cfg.device, optimizer.load_state_dict = "cpu", load_part  # type: ignore[method-assign]
    try:
        # mapped, so that only this shard's part is ever in memory
        with serialization.patch("load.mmap", True):  # type: ignore[attr-defined]
            stock(trainer, checkpoint_path)
    finally:
        trainer.cfg.device = device
        del optimizer.load_state_dict
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        setattr(trainer, name, getattr(trainer, name).to(device))
