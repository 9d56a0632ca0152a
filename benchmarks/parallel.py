"""Step time and bytes moved of one process, of data parallel, of a dictionary in shards, of copies of shards.

    python -m benchmarks.parallel --processes 2 4                   # gloo, on this machine's cores
    torchrun --nproc-per-node 8 -m benchmarks.parallel --device cuda    # nccl, one GPU each

Every process trains on the same global batch. "moved" is what a process gives to collectives in a step, in
bytes of tensors: what an all-reduce or an all-gather then sends over the wire is at most twice that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from torch.distributed.device_mesh import init_device_mesh

import saelens_matryoshka as sm
from benchmarks.machine import describe
from saelens_matryoshka.adam import fuse_adam
from saelens_matryoshka.parallel.dictionary import shard
from saelens_matryoshka.parallel.processes import Processes
from saelens_matryoshka.parallel.trainer import parallelize

WARM_UP = 3


def meshes(size: int, shards: int) -> dict[str, tuple[int, int]]:
    """Blocks of rows by shards, of each mode that so many processes can work in."""
    found = {"data": (size, 1), "dictionary": (1, size)}
    if 1 < shards < size and size % shards == 0:
        found["hybrid"] = size // shards, shards
    return found


def train(args: argparse.Namespace, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """Seconds and bytes of a step, of this process: alone, or in a mesh of this shape."""
    size, shards = (shape[0] * shape[1], shape[1]) if shape is not None else (1, 1)
    torch.manual_seed(0)
    device = torch.device(args.device, torch.cuda.current_device()) if args.device == "cuda" else "cpu"
    cfg = sm.MatryoshkaTrainingSAEConfig.recommended(
        d_in=args.d, d_sae=args.d_sae, k=args.k, device="cpu" if shards > 1 else str(device)
    )
    sae = sm.MatryoshkaTrainingSAE(cfg)
    group = None
    if shape is not None:
        mesh = init_device_mesh(args.device, shape, mesh_dim_names=("rows", "latents"))
        group = Processes(mesh, args.d_sae)
        if shards > 1:
            shard(sae, group, device)
    rank = group.rank if group else 0
    own = args.batch // size
    rows = torch.randn(args.batch, args.d, generator=torch.Generator().manual_seed(0))
    batch = rows[rank * own : (rank + 1) * own].to(device)
    n_steps = WARM_UP + args.steps
    trainer = SAETrainer(_trainer_config(args, str(device), n_steps), sae, iter([batch] * n_steps))
    fuse_adam(trainer.optimizer)
    if group is not None:
        parallelize(trainer, group)
    seconds, moved = [], 0
    for step in range(n_steps):
        if step == n_steps - 1:
            moved = -_bytes_moved()
        if size > 1:
            dist.barrier()
        start = time.perf_counter()
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    moved += _bytes_moved()
    return {"seconds": statistics.median(seconds[WARM_UP:]), "moved": moved}


_moved = 0


def _bytes_moved() -> int:
    return _moved


def _count_bytes() -> None:
    """Count what the collectives are given, but for DDP's."""

    def counted(collective: Any, tensor_at: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            global _moved
            tensor = args[tensor_at]
            _moved += tensor.numel() * tensor.element_size()
            return collective(*args, **kwargs)

        return call

    dist.all_reduce = counted(dist.all_reduce, 0)
    dist.all_gather = counted(dist.all_gather, 1)


def _trainer_config(args: argparse.Namespace, device: str, n_steps: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=n_steps * args.batch,
        device=device,
        autocast=args.autocast,
        lr=1e-4,
        lr_end=1e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=args.batch,
        dead_feature_window=1000,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1,
    )


def _process(rank: int, size: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    _count_bytes()
    results = {mode: train(args, shape) for mode, shape in meshes(size, args.shards).items()}
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _on_cores(size: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (size, folder, args), nprocs=size, start_method="spawn")
        return json.loads((Path(folder) / "results.json").read_text())


def _on_gpus(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    _count_bytes()
    size = dist.get_world_size()
    results = {"alone": train(args)}
    results |= {mode: train(args, shape) for mode, shape in meshes(size, args.shards).items()}
    dist.barrier()
    return size, results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="*", default=[2])
    parser.add_argument("--shards", type=int, default=2, help="of every copy, in the mode hybrid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--d_sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024, help="rows of all processes together")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda":
        size, results = _on_gpus(args)
        rows = [(mode, 1 if mode == "alone" else size, result) for mode, result in results.items()]
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return
    else:
        torch.set_num_threads(1)
        rows = [("alone", 1, train(args))]
        for size in args.processes:
            rows += [(mode, size, result) for mode, result in _on_cores(size, args).items()]
    alone = rows[0][2]["seconds"]
    print(f"d {args.d}, d_sae {args.d_sae}, k {args.k}, batch {args.batch}, median of {args.steps} steps")
    print("mode        processes   ms/step   of alone   MB moved")
    for mode, size, result in rows:
        print(
            f"{mode:<12}{size:>9}{1e3 * result['seconds']:>10.1f}{result['seconds'] / alone:>11.2f}"
            f"{result['moved'] / 1e6:>11.2f}"
        )
    if args.json:
        machine = describe(args.device)
        found = [{"mode": mode, "processes": size, **result} for mode, size, result in rows]
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(
            json.dumps({"machine": machine, "settings": settings, "results": found}, indent=1)
        )


if __name__ == "__main__":
    main()
