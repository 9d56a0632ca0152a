"""A training run as one job of many processes, started by torchrun.

    torchrun --nproc-per-node 8 -m saelens_matryoshka train ...
    torchrun --nproc-per-node 8 -m saelens_matryoshka train --shard dictionary ...
    torchrun --nnodes 8 --nproc-per-node 8 ... -m saelens_matryoshka train --shard dictionary --shards 8 ...

A process that torchrun has not started is a job of one, for which all of this does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, SAETrainer, TrainingSAE
from torch.distributed.device_mesh import init_device_mesh
from tqdm.auto import tqdm

from saelens_matryoshka.parallel.data import save_all_states, share_data
from saelens_matryoshka.parallel.dictionary import load_trainer_state, shard
from saelens_matryoshka.parallel.processes import Processes
from saelens_matryoshka.parallel.trainer import parallelize, writing
from saelens_matryoshka.runner import prepare_trainer, require_pretrained
from saelens_matryoshka.seams import replacing_load_trainer_state
from saelens_matryoshka.upkeep.keeper import Keeper

Sharding = Literal["dictionary"]

# How long a process waits for another. The longest wait is for the first one, while it saves.
_TIMEOUT = timedelta(minutes=30)
_lost = threading.Event()


class Mesh(NamedTuple):
    """How processes divide the work on one dictionary."""

    row_blocks: int = 1
    """into how many blocks the rows are cut, each with a copy of the dictionary"""
    shards: int = 1
    """of each copy"""

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.row_blocks * self.shards


class LostProcessError(RuntimeError):
    """Another process of the job has ended, or does not answer."""


class Job:
    """The processes that train one dictionary."""

    def __init__(self, group: Processes | None = None) -> None:
        self._group = group

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self._group is None or self._group.rank == 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self._group is None else self._group.size

    def overrides(self, cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
        """What a runner is to be given: where the dictionary is sharded, this process's shard."""
        group = self._group
        return {} if group is None or group.shards == 1 else {"override_sae": self._shard(cfg, group)}

    def _shard(self, cfg: LanguageModelSAERunnerConfig[Any], group: Processes) -> Any:
        require_pretrained(cfg)  # in all processes: the first alone reads it, and the others would wait
        sae: Any
        sae_cfg = type(cfg.sae).from_dict(cfg.get_training_sae_cfg_dict())
        sae_cfg.device = "cpu" if group.rank == 0 else "meta"
        resumed = cfg.resume_from_checkpoint
        with torch.device(sae_cfg.device):
            if cfg.from_pretrained_path is not None and group.rank == 0:
                sae = TrainingSAE.load_from_disk(cfg.from_pretrained_path, "cpu")
            else:
                sae = TrainingSAE.from_dict(sae_cfg.to_dict())
            if resumed is not None and group.rank == 0:
                sae.load_weights_from_checkpoint(resumed)
        shard(sae, group, cfg.device)
        if resumed is not None:
            sae.load_training_state(resumed)  # small, and the same in all shards
        if resumed is not None or cfg.from_pretrained_path is not None:
            sae._prepared = True
            sae.load_weights_from_checkpoint = lambda checkpoint_path: None  # noqa: ARG005
        return sae

    def share(self, runner: LanguageModelSAETrainingRunner, keeper: Keeper) -> None:
        """Have a runner, before it runs, train together with those of the other processes.

        Args:
            runner: Of the same config in all processes.
            keeper: Of its checkpoints.

        Raises:
            ValueError: the batch or the dataset cannot be divided.
        """
        group = self._group
        if group is None:
            return
        store: Any = runner.activations_store  # one of ours
        share_data(store, group.rank, group.size)
        save_all_states(store, group)
        train, save, run = runner.run_trainer_with_interruption_handling, runner.save_final_sae, runner.run

        def run_trainer(trainer: SAETrainer[Any, Any]) -> Any:
            prepare_trainer(trainer)
            parallelize(trainer, group)
            fit, checkpoints = trainer.fit, keeper.checkpoints

            def fit_together() -> Any:
                with _naming_loss(group):
                    return fit()

            trainer.fit = fit_together  # type: ignore[method-assign]
            keeper.group = group
            checkpoints.save = writing(trainer, group, checkpoints.save)  # type: ignore[method-assign]
            runner.save_final_sae = writing(trainer, group, save, optimizer=False)  # type: ignore[method-assign]
            return train(trainer)

        def run_sharded() -> Any:
            with replacing_load_trainer_state(functools.partial(load_trainer_state, group=group)):
                return run()

        runner.run_trainer_with_interruption_handling = run_trainer  # type: ignore[method-assign]
        if group.shards > 1:
            runner.run = run_sharded  # type: ignore[method-assign]
        dist.barrier()  # all have loaded and checked everything


def is_torchrun() -> bool:
    """Whether torchrun has started this process, with others."""
    return _n_processes() > 1 and "RANK" in os.environ


def is_first_process() -> bool:
    """Whether this process is the one that shows and writes what all would."""
    return int(os.environ.get("RANK", "0")) == 0


def mesh_shape(sharding: Sharding | None, shards: int | None = None, size: int | None = None) -> Mesh:
    """Into how many blocks of rows, and of latents, processes divide the work.

    Args:
        sharding: "dictionary" divides the latents; None, only the rows.
        shards: Among how many processes; None, all. There are then as many copies of the dictionary as the
            processes allow, each of which has its rows.
        size: How many processes; None, those of torchrun's job.

    Raises:
        ValueError: this process was started alone, or the processes cannot be divided like that.
    """
    if sharding is None:
        if shards is not None:
            raise ValueError(f"--shards {shards} is of a dictionary in shards: give --shard dictionary too.")
        return Mesh(row_blocks=size or _n_processes())
    if not (size or is_torchrun()):
        raise ValueError(
            f"--shard {sharding} divides the dictionary among processes, and there is one. Start several, "
            "e.g. torchrun --nproc-per-node 8 -m saelens_matryoshka train --shard dictionary ..., or give an "
            "estimate their number, e.g. --processes 8."
        )
    size = size or _n_processes()
    shards = size if shards is None else shards
    if shards < 1 or size % shards:
        possible = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(
            f"--shards {shards} does not divide the {size} processes: take one of {possible}, e.g. the GPUs "
            "of a node."
        )
    return Mesh(size // shards, shards)


def _n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(
    cfg: LanguageModelSAERunnerConfig[Any], sharding: Sharding | None = None, shards: int | None = None
) -> Iterator[Job]:
    """Join the other processes of torchrun's job.

    Args:
        cfg: The runner's config. Where it says "cuda", it is made to say which.
        sharding: "dictionary" gives each process a part of the latents; None, a part of the rows only.
        shards: As in `mesh_shape`.

    Raises:
        ValueError: the dictionary cannot be sharded so.
        LostProcessError: another process ended meanwhile.
    """
    shape = mesh_shape(sharding, shards)
    if not is_torchrun():
        yield Job()
        return
    rank = int(os.environ["RANK"])
    device = _use_own_device(cfg)
    if rank > 0:
        _be_quiet()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("rows", "latents"))
        group = Processes(mesh, cfg.sae.d_sae)
        with _naming_loss(group):
            yield Job(group)
    except Exception as error:
        follows = isinstance(error, LostProcessError) or isinstance(error.__cause__, LostProcessError)
        if rank > 0 and not follows:  # what the first process says is shown by the command
            print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _terminate(number: int, frame: Any) -> None:  # noqa: ARG001
    """End by SIGTERM, which torchrun sends when another process has gone: after having said so."""
    if not _lost.is_set():
        sys.exit(128 + number)


def _be_quiet() -> None:
    """One process of a job shows and logs what is going on."""
    os.environ["WANDB_MODE"] = "disabled"
    warnings.simplefilter("ignore")
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]


def _use_own_device(cfg: LanguageModelSAERunnerConfig[Any]) -> torch.device:
    """Make "cuda" this process's GPU."""
    device = torch.device(cfg.device)
    if device.type != "cuda":
        return device
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(local)
    for name in ("device", "llm_device", "act_store_device"):
        if torch.device(getattr(cfg, name) or "cuda").type == "cuda":
            setattr(cfg, name, str(local))
    cfg.sae.device = str(local)
    return local


@contextlib.contextmanager
def _naming_loss(group: Processes) -> Iterator[None]:
    """Say in plain words when torch's error is that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup")
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in signs):
            raise
        _lost.set()
        raise LostProcessError(
            f"process {group.rank} of {group.size} has lost another one, which has ended, or did not answer "
            f"for {_TIMEOUT.total_seconds() / 60:.0f} minutes. See what that one said. If the run has "
            "a checkpoint, it can be resumed from there, on any number of processes."
        ) from error
