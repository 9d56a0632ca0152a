"""Run a function in several processes that talk over gloo, and bring back what each returns."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from saelens_matryoshka.parallel.processes import Processes


def run_in_processes(n: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in n processes of one group; the results by rank."""
    # forked, because importing everything anew in each of them takes longer than what they do
    mp.start_processes(_work, (n, _free_port(), str(folder), function, args), nprocs=n, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def run_job(n: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in n processes that torchrun might have started; the results by rank."""
    mp.start_processes(
        _work_in_job, (n, _free_port(), str(folder), function, args), nprocs=n, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def group_of(n_rows: int, n_latents: int, d_sae: int) -> Processes:
    """This process's group, on a mesh of this shape."""
    mesh = init_device_mesh("cpu", (n_rows, n_latents), mesh_dim_names=("rows", "latents"))
    return Processes(mesh, d_sae)


def _work(rank: int, n: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=n)
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _work_in_job(rank: int, n: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    torch.save(function(*args), Path(folder) / f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
