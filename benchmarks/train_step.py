"""Time and memory of one training step, ours beside SAELens's own, through SAELens's trainer.

All contestants take turns in one process, on the same data, and the median of their turns counts. The
*floor* is what no exact step can do without: the encoder's product and one pass of (fused) Adam over
weights and gradients, measured in the same turns.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --d 2304 --d-sae 36864 --k 96 --batch 4096 --device cuda --autocast
    python -m benchmarks.train_step --d 2304 --d-sae 36864 --k 96 --batch 4096 --device cuda --autocast \\
        --only ours --tensor-core-advantage 1000  # with dense products for the kept entries; 0 gathers rows
    python -m benchmarks.train_step --screen never  # every pre-activation in float32; on_gpu, for those too
    python -m benchmarks.train_step --memory      # peak memory, each contestant in a process of its own
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
)
from sae_lens.config import SAETrainerConfig

import saelens_matryoshka as sm
from benchmarks import machine
from saelens_matryoshka.ops import entries, reference_step, screen
from saelens_matryoshka.runner import prepare_trainer

STOCK, ONE_LEVEL, REFERENCE, OURS, FLOOR = (
    "stock matryoshka_batchtopk",
    "stock batchtopk",
    "our reference",
    "ours",
    "floor",
)
ALL = (STOCK, ONE_LEVEL, REFERENCE, OURS)


@dataclass(frozen=True)
class Problem:
    """Sizes of one measurement."""

    d: int
    d_sae: int
    k: float
    batch: int
    levels: int
    dead: float
    device: str
    autocast: bool

    def widths(self) -> list[int]:
        """Each level twice as wide as the one before."""
        return [self.d_sae // 2 ** (self.levels - 1 - level) for level in range(self.levels)]


def batches(problem: Problem) -> list[torch.Tensor]:
    """Three batches of sparse combinations of 2000 directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2000, problem.d, generator=generator)
    made = []
    for _ in range(3):
        active = torch.rand(problem.batch, 2000, generator=generator) < 0.01
        made.append((active * torch.rand(problem.batch, 2000, generator=generator)) @ directions)
    return [batch.to(problem.device) for batch in made]


def trainer(name: str, problem: Problem) -> SAETrainer[Any, Any]:
    """SAELens's trainer around one contestant."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "d_in": problem.d,
        "d_sae": problem.d_sae,
        "k": problem.k,
        "device": problem.device,
    }
    nested = {**settings, "matryoshka_widths": problem.widths()}
    if name == ONE_LEVEL:
        sae: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**settings))
    elif name == STOCK:
        sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**nested))
    else:
        sae = sm.MatryoshkaTrainingSAE(sm.MatryoshkaTrainingSAEConfig(**nested))
    made = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**12,
            device=problem.device,
            autocast=problem.autocast,
            lr=3e-4,
            lr_end=3e-4,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=problem.batch,
            dead_feature_window=1000,
            feature_sampling_window=10**9,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1,
        ),
        sae,
        iter(()),
    )
    if name == REFERENCE:
        sae.step_fn = reference_step
    elif name == OURS:
        prepare_trainer(made)
    return made


def contestant(name: str, problem: Problem, data: list[torch.Tensor]) -> Callable[[int], None]:
    """A function that runs turn i of one contestant."""
    if name == FLOOR:
        return floor(problem, data)
    made = trainer(name, problem)
    n_dead = int(problem.dead * problem.d_sae)
    dead = torch.randperm(problem.d_sae, generator=torch.Generator().manual_seed(1))[:n_dead].sort().values

    def turn(i: int) -> None:
        if n_dead:
            made.n_forward_passes_since_fired[dead.to(problem.device)] = 1e6
        made.step(data[i % len(data)])
        made.n_training_steps += 1

    return turn


def floor(problem: Problem, data: list[torch.Tensor]) -> Callable[[int], None]:
    """The encoder's product and a pass of fused Adam over both matrices."""
    device = problem.device
    weights = [torch.randn(problem.d_sae, problem.d, device=device, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(weights, lr=1e-9, fused=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    out = None
    if not problem.autocast:
        out = torch.empty(problem.batch, problem.d_sae, device=device)

    def turn(i: int) -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=problem.autocast):
            torch.mm(data[i % len(data)], weights[0].T, out=out)
        adam.step()

    return turn


def measure(
    problems: list[Problem], names: tuple[str, ...], turns: int, warmup: int
) -> list[dict[str, float]]:
    """Median seconds of each contestant's turns, for each problem; all take turns in alternation.

    The problems differ in levels and dead latents only.
    """
    data = batches(problems[0])
    running = {
        (row, name): contestant(name, problem, data)
        for row, problem in enumerate(problems)
        for name in (*names, FLOOR)
    }
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in running}
    for i in range(warmup + turns):
        for key, turn in running.items():
            _synchronize(problems[0].device)
            start = time.perf_counter()
            turn(i)
            _synchronize(problems[0].device)
            if i >= warmup:
                seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    return [{name: medians[row, name] for name in (*names, FLOOR)} for row in range(len(problems))]


def peak_memory(problem: Problem, name: str) -> float:
    """Gigabytes that three steps of one contestant need beyond the imports and the data."""
    data = batches(problem)
    if problem.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = machine.peak_resident()
    turn = contestant(name, problem, data)
    for i in range(3):
        turn(i)
    if problem.device == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    return (machine.peak_resident() - before) / 2**30


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _table(problem: Problem, rows: list[dict[str, Any]]) -> Table:
    title = f"d={problem.d}, d_sae={problem.d_sae}, k={problem.k:g}, batch={problem.batch}"
    table = Table(title=title + (", bf16 autocast" if problem.autocast else ""))
    for heading in ("levels", "dead", "step", "ms", "of stock", "× floor"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for row in rows:
        for name, seconds in row["seconds"].items():
            stock = row["seconds"].get(STOCK)
            table.add_row(
                str(row["levels"]),
                f"{row['dead']:.0%}",
                name,
                f"{1e3 * seconds:.1f}",
                "" if name == FLOOR or stock is None else f"{stock / seconds:.2f}× as fast",
                f"{seconds / row['seconds'][FLOOR]:.2f}",
            )
        table.add_section()
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12288)
    parser.add_argument("--k", type=float, default=64)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), help="contestants")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument(
        "--together", action="store_true", help="all rows in the same turns, to compare them; more memory"
    )
    parser.add_argument("--tensor-core-advantage", type=int, help="instead of ours, for bfloat16 on a GPU")
    parser.add_argument("--screen", choices=("never", "on_gpu"), help="other than where it is known to pay")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one-memory", choices=ALL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.tensor_core_advantage is not None:
        entries.TENSOR_CORE_ADVANTAGE = args.tensor_core_advantage
    if args.screen == "never":
        screen.has_bfloat16_matrices = lambda _: False
    screen.ON_GPU = args.screen == "on_gpu"

    def problem(levels: int, dead: float) -> Problem:
        sizes = (args.d, args.d_sae, args.k, args.batch)
        return Problem(*sizes, levels, dead, args.device, args.autocast)

    if args.one_memory:
        print(peak_memory(problem(args.levels[0], args.dead[0]), args.one_memory))
        return
    console = Console()
    rows: list[dict[str, Any]] = []
    for levels in args.levels:
        for dead in args.dead:
            row: dict[str, Any] = {"levels": levels, "dead": dead}
            if args.memory:
                row["peak_gb"] = {
                    name: float(
                        subprocess.run(
                            [sys.executable, "-m", "benchmarks.train_step", "--one-memory", name]
                            + ["--levels", str(levels), "--dead", str(dead)]
                            + ["--d", str(args.d), "--d-sae", str(args.d_sae), "--k", str(args.k)]
                            + ["--batch", str(args.batch), "--device", args.device]
                            + ["--autocast"] * args.autocast
                            + (["--screen", args.screen] if args.screen else []),
                            check=True,
                            stdout=subprocess.PIPE,
                            text=True,
                        ).stdout
                    )
                    for name in args.only
                }
                console.print(row)
            rows.append(row)
    if not args.memory:
        problems = [problem(row["levels"], row["dead"]) for row in rows]
        together = [problems] if args.together else [[one] for one in problems]
        found = [measure(some, tuple(args.only), args.turns, args.warmup) for some in together]
        for row, seconds in zip(rows, chain.from_iterable(found), strict=True):
            row["seconds"] = seconds
    result = {"machine": machine.describe(args.device), "settings": vars(args) | {"json": None}, "rows": rows}
    if not args.memory:
        console.print(_table(problem(1, 0), rows))
    console.print(result["machine"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, default=str))


if __name__ == "__main__":
    main()
