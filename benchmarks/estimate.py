"""Memory as `saelens-matryoshka estimate` predicts it, beside what real runs take.

Every run is SAELens's runner on a language model of the given shape with random weights and random tokens,
in a process of its own, or in two that train together. On a CPU its largest resident memory counts, less that
of the process after a run of no size, and of two processes the larger; on a GPU
`torch.cuda.max_memory_allocated`. The time is that of the training loop.

    python -m benchmarks.estimate
    python -m benchmarks.estimate --only gpt2 --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, SAETrainer

import saelens_matryoshka as sm
from benchmarks import machine
from saelens_matryoshka.layers import train_layers
from saelens_matryoshka.parallel import Mesh, joined
from saelens_matryoshka.runner import observe
from saelens_matryoshka.runs.estimate import estimate
from saelens_matryoshka.runs.language_models import model_shape
from saelens_matryoshka.runs.memory import ALONE, CUDA_CONTEXT_BYTES, LOADING, PROCESS_BYTES
from saelens_matryoshka.runs.training import RunRunner
from saelens_matryoshka.upkeep.checkpoints import Checkpoints
from saelens_matryoshka.upkeep.keeper import Keeper

# name: (architecture, settings of the dictionary, settings of the runner)
_GPT2 = {"model_name": "gpt2", "context_size": 128, "store_batch_size_prompts": 8}
_PYTHIA = {"model_name": "pythia-70m-deduped", "context_size": 128, "store_batch_size_prompts": 16}
_TINY = {"model_name": "tiny", "context_size": 256, "store_batch_size_prompts": 16}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tiny SAE, 32,768 latents": (
        "sae",
        {"d_in": 128, "d_sae": 32768, "k": 32},
        {**_TINY, "layer": 1, "n_batches_in_buffer": 64, "train_batch_size_tokens": 2048, "steps": 6},
    ),
    "tiny transcoder, large buffer": (
        "transcoder",
        {"d_in": 128, "d_sae": 4096, "k": 32},
        {**_TINY, "layer": 2, "n_batches_in_buffer": 1024, "train_batch_size_tokens": 4096, "steps": 12},
    ),
    "tiny, 4 transcoders in lockstep": (
        "transcoder",
        {"d_in": 128, "d_sae": 16384, "k": 32},
        {**_TINY, "layers": [0, 1, 2, 3], "n_batches_in_buffer": 64, "train_batch_size_tokens": 1024,
         "steps": 3},
    ),
    "pythia-70m, prompts of 1,024 tokens": (
        "transcoder",
        {"d_in": 512, "d_sae": 4096, "k": 32},
        {**_PYTHIA, "layer": 1, "context_size": 1024, "store_batch_size_prompts": 8, "n_batches_in_buffer": 8,
         "train_batch_size_tokens": 2048, "steps": 5},
    ),
    "pythia-70m, prefetching": (
        "sae",
        {"d_in": 512, "d_sae": 8192, "k": 32},
        {**_PYTHIA, "layer": 0, "n_batches_in_buffer": 512, "train_batch_size_tokens": 4096, "steps": 24,
         "prefetch_llm_batches": True},
    ),
    "gpt2 transcoder": (
        "transcoder",
        {"d_in": 768, "d_sae": 24576, "k": 32},
        {**_GPT2, "layer": 0, "n_batches_in_buffer": 64, "train_batch_size_tokens": 2048, "steps": 6},
    ),
    "the same in bfloat16": (
        "transcoder",
        {"d_in": 768, "d_sae": 24576, "k": 32, "dtype": "bfloat16"},
        {**_GPT2, "layer": 0, "n_batches_in_buffer": 64, "train_batch_size_tokens": 2048, "steps": 6,
         "dtype": "bfloat16"},
    ),
    "the same under autocast": (
        "transcoder",
        {"d_in": 768, "d_sae": 24576, "k": 32},
        {**_GPT2, "layer": 0, "n_batches_in_buffer": 64, "train_batch_size_tokens": 2048, "steps": 6,
         "autocast": True, "autocast_lm": True},
    ),
    "gpt2 skip transcoder, 8,192 rows": (
        "skip_transcoder",
        {"d_in": 768, "d_sae": 12288, "k": 64},
        {**_GPT2, "layer": 0, "n_batches_in_buffer": 128, "train_batch_size_tokens": 8192, "steps": 4},
    ),
    "gpt2-medium SAE": (
        "sae",
        {"d_in": 1024, "d_sae": 8192, "k": 32},
        {**_GPT2, "model_name": "gpt2-medium", "layer": 0, "n_batches_in_buffer": 64,
         "train_batch_size_tokens": 2048, "steps": 6},
    ),
    "tiny SAE, data parallel on 2": (
        "sae",
        {"d_in": 128, "d_sae": 65536, "k": 32},
        {**_TINY, "layer": 1, "n_batches_in_buffer": 64, "train_batch_size_tokens": 1024, "steps": 6,
         "mesh": Mesh(row_blocks=2)},
    ),
    "tiny SAE, 2 shards": (
        "sae",
        {"d_in": 128, "d_sae": 65536, "k": 32},
        {**_TINY, "layer": 1, "n_batches_in_buffer": 64, "train_batch_size_tokens": 1024, "steps": 6,
         "mesh": Mesh(shards=2)},
    ),
}  # fmt: skip
_CLASSES = {
    "sae": sm.MatryoshkaTrainingSAEConfig,
    "transcoder": sm.MatryoshkaTrainingTranscoderConfig,
    "skip_transcoder": sm.MatryoshkaTrainingSkipTranscoderConfig,
}


def runner_configs(
    name: str, device: str, output_path: str | None
) -> dict[str, LanguageModelSAERunnerConfig[Any]]:
    """The configs of a case by name: one, or those of several layers."""
    kind, sae, run = CASES[name]
    run = dict(run)
    layers, steps = run.pop("layers", None) or [run.pop("layer")], run.pop("steps")
    run.pop("mesh", None)
    dictionary: dict[str, Any] = {**sae, "device": device}
    d_sae = dictionary["d_sae"]
    widths = [d_sae // 16, d_sae // 4, d_sae // 2, d_sae]
    settings: dict[str, Any] = {
        "dataset_path": "random tokens",
        "training_tokens": steps * run["train_batch_size_tokens"],
        "n_eval_batches": 1,
        "device": device,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "verbose": False,
    }
    configs = {}
    for layer in layers:
        hook_name = f"blocks.{layer}.hook_resid_post"
        if kind != "sae":
            hook_name = f"blocks.{layer}.ln2.hook_normalized"
            dictionary["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
        sae_config = _CLASSES[kind](matryoshka_widths=widths, **dictionary)
        configs[f"layer-{layer}"] = LanguageModelSAERunnerConfig(
            sae=sae_config,
            hook_name=hook_name,
            output_path=output_path and f"{output_path}/{layer}",
            **{**settings, **run},
        )
    return configs


def measure(name: str, device: str) -> dict[str, float]:
    """Run a case in this process: bytes at the peak, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        _run({"miniature": _miniature(device, f"{folder}/miniature")})
        before = psutil.Process().memory_info().rss
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        mesh = mesh_of(name)
        if mesh.size > 1:
            os.environ["WORLD_SIZE"] = str(mesh.size)  # only now: the miniature is a run of one process
        seconds = _run(runner_configs(name, device, f"{folder}/run"), mesh)
    if device == "cuda":
        used = torch.cuda.max_memory_allocated()
    else:
        used = machine.peak_resident() - before
    return {"bytes": used, "seconds": seconds}


def _miniature(device: str, output_path: str) -> LanguageModelSAERunnerConfig[Any]:
    """A run of no size, which loads all that a run loads."""
    (cfg,) = runner_configs("tiny transcoder, large buffer", device, output_path).values()
    cfg.sae = sm.MatryoshkaTrainingTranscoderConfig(
        d_in=128, d_sae=64, k=4, matryoshka_widths=[64], hook_name_out=cfg.sae.hook_name_out, device=device
    )
    cfg.training_tokens, cfg.train_batch_size_tokens, cfg.n_batches_in_buffer = 512, 256, 2
    cfg.context_size, cfg.store_batch_size_prompts = 128, 2
    return cfg


def mesh_of(name: str) -> Mesh:
    """The processes that a case is for."""
    return CASES[name][2].get("mesh", ALONE)


def _run(cfgs: dict[str, LanguageModelSAERunnerConfig[Any]], mesh: Mesh = ALONE) -> float:
    """Seconds of the training loop."""
    cfg = next(iter(cfgs.values()))
    n_prompts = cfg.store_batch_size_prompts * 4
    tokens = torch.randint(3, 1000, (n_prompts, cfg.context_size))
    replaced: dict[str, Any] = {
        "override_model": model_shape(cfg).build(cfg.device),
        "override_dataset": datasets.Dataset.from_dict({"input_ids": tokens.numpy()}),
    }
    times: list[float] = []

    def note_time(*_: Any) -> None:
        times.append(time.perf_counter())

    if len(cfgs) > 1:
        train_layers(cfgs, observers={list(cfgs)[-1]: [note_time]}, on_start=note_time, **replaced)
        return times[-1] - times[0]
    if mesh.size > 1:
        with joined(cfg, "dictionary", mesh.shards) as job:
            keeper = Keeper(Checkpoints(Path(f"{cfg.output_path}/checkpoints")), minutes=0)
            together = RunRunner(cfg, observers=[note_time], keeper=keeper, **replaced, **job.overrides(cfg))
            job.share(together, keeper)
            together.run()
        return times[-1] - times[0]
    runner = LanguageModelSAETrainingRunner(cfg, **replaced)
    stock = SAETrainer.fit

    def fit(trainer: Any) -> Any:
        observe(trainer, note_time)
        note_time()
        return stock(trainer)

    SAETrainer.fit = fit  # type: ignore[method-assign]
    try:
        runner.run()
    finally:
        SAETrainer.fit = stock  # type: ignore[method-assign]
    return times[-1] - times[0]


def compare(name: str, device: str, *, with_time: bool = True) -> dict[str, Any]:
    """Estimate and measurement of a case, each in a process of its own."""
    mesh = mesh_of(name)
    measured = _measured(name, device, mesh.size)
    predicted = estimate(*runner_configs(name, device, None).values(), with_time=with_time, mesh=mesh)
    place = next(d for d in predicted.devices if d.name.startswith(device))
    # the model is not loaded from files here, and the process was there before
    there = CUDA_CONTEXT_BYTES if device == "cuda" else PROCESS_BYTES
    used = max(n for phase, n in place.phases.items() if phase != LOADING) - there
    at = max((n, phase) for phase, n in place.phases.items() if phase != LOADING)[1]
    return {
        "case": name,
        "peak_while": at,
        "estimated_bytes": used,
        "measured_bytes": measured["bytes"],
        "estimated_seconds": predicted.time.total if predicted.time else None,
        "measured_seconds": measured["seconds"],
    }


def _measured(name: str, device: str, n_processes: int) -> dict[str, float]:
    """What `measure` finds in processes of their own: of several, the most."""
    command = [sys.executable, "-m", "benchmarks.estimate", "--device", device, "--measure", name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n_processes)
    ]
    found: list[dict[str, float]] = []
    for process in started:
        said, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{name}: {errors.strip().splitlines()[-1]}")
        found.append(json.loads(said.splitlines()[-1]))
    return {key: max(one[key] for one in found) for key in found[0]}


def table(rows: list[dict[str, Any]]) -> Table:
    """Estimate against measurement."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("run")
    for heading in ("estimated", "measured", "ratio", "est. time", "measured", "ratio"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seconds = row["estimated_seconds"]
        made.add_row(
            row["case"],
            f"{row['estimated_bytes'] / 1e6:,.0f} MB",
            f"{row['measured_bytes'] / 1e6:,.0f} MB",
            f"{row['estimated_bytes'] / row['measured_bytes']:.2f}",
            f"{seconds:.1f} s" if seconds else "",
            f"{row['measured_seconds']:.1f} s",
            f"{seconds / row['measured_seconds']:.2f}" if seconds else "",
        )
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-time", action="store_true", help="compare the memory only")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.measure:
        print(json.dumps(measure(args.measure, args.device)))
        return
    console = Console()
    rows = []
    for name in CASES:
        if args.only in name:
            rows.append(compare(name, args.device, with_time=not args.no_time))
            console.print(f"{name}: done", style="dim")
    console.print(table(rows))
    described = machine.describe(args.device)
    console.print(described)
    if args.json:
        args.json.write_text(json.dumps({"machine": described, "runs": rows}, indent=2))


if __name__ == "__main__":
    main()
