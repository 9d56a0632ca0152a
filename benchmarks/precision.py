"""What mixed precision and the placement of the models cost and give, through SAELens's own fields.

Each setting trains the same transcoder of the embedded model with the same seed, in a process of its own, all
of them in turn; the median over the rounds counts. Speed is that of the training loop after its first step,
memory the largest resident one less what a process takes that trains next to nothing (on a GPU
`torch.cuda.max_memory_allocated`), FVU and L0 those of the saved model on held-out text.

    python -m benchmarks.precision
    python -m benchmarks.precision --device cuda --model gpt2 --layer 8 --d-sae 24576 --batch 4096
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETrainer,
)
from sae_lens.load_model import load_model

import saelens_matryoshka as sm
from benchmarks import machine
from saelens_matryoshka import tiny
from saelens_matryoshka.runner import observe

BASE = "float32"


def settings(device: str) -> dict[str, dict[str, Any]]:
    """By name, fields of SAELens's runner config; those of two devices only where there are two."""
    found: dict[str, dict[str, Any]] = {
        BASE: {},
        "autocast": {"autocast": True},
        "autocast_lm": {"autocast_lm": True},
        "both autocasts": {"autocast": True, "autocast_lm": True},
        "dtype bfloat16": {"dtype": "bfloat16"},
        "prefetch": {"prefetch_llm_batches": True},
        "prefetch 4": {"prefetch_llm_batches": 4},
    }
    if device == "cuda":
        found["store on the CPU"] = {"act_store_device": "cpu"}
        found["language model on the CPU"] = {"llm_device": "cpu"}
        if torch.cuda.device_count() > 1:
            split = {"device": "cuda:0", "llm_device": "cuda:1"}
            found["two GPUs"] = split
            found["two GPUs, prefetch"] = {**split, "prefetch_llm_batches": True}
    return found


def train(args: argparse.Namespace, fields: dict[str, Any], folder: str, tokens: int) -> float:
    """Train and save; tokens per second."""
    dtype = fields.get("dtype", "float32")
    device, llm_device = fields.get("device", args.device), fields.get("llm_device", args.device)
    if args.model is None:
        model: Any = tiny.load_hooked_transformer().to(llm_device)
    else:
        model = load_model("HookedTransformer", args.model, llm_device)
    source, target = (sm.find_site(model, args.layer, site) for site in ("mlp_in", "mlp_out"))
    width = model.cfg.d_model
    sae = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=width, d_sae=args.d_sae, k=args.k, dtype=dtype, device=device, hook_name_out=target.hook_name,
        input_gain="none" if source.gain is None else "norm_weight",
    )  # fmt: skip
    size = {"training_tokens": tokens, "train_batch_size_tokens": min(args.batch, tokens // 2)}
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=source.hook_name,
        model_name=args.model or "tiny",
        dataset_path="the Python standard library",
        is_dataset_tokenized=False,
        context_size=min(256, model.cfg.n_ctx),
        store_batch_size_prompts=16,
        n_batches_in_buffer=max(64, 2 * args.batch // 256),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=folder,
        verbose=False,
        seed=0,
        **size,
        **sm.recommended_runner_fields(sae, **size),
        **{"device": args.device, **fields},
    )
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=model, override_dataset=tiny.text.dataset("train")
    )
    times: list[tuple[float, int]] = []
    stock = SAETrainer.fit

    def fit(trainer: Any) -> Any:
        observe(trainer, lambda done, _: times.append((time.perf_counter(), done.n_training_samples)))
        return stock(trainer)

    SAETrainer.fit = fit  # type: ignore[method-assign]
    try:
        runner.run()
        if "cuda" in str(device):
            torch.cuda.synchronize()
    finally:
        SAETrainer.fit = stock  # type: ignore[method-assign]
    (start, before), (end, after) = times[0], times[-1]
    return (after - before) / (end - start)


def measure(args: argparse.Namespace, fields: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        train(args, fields, f"{folder}/small", 4 * 256)
        before = psutil.Process().memory_info().rss
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = train(args, fields, f"{folder}/run", args.tokens)
        if args.device == "cuda":
            used = torch.cuda.max_memory_allocated()
        else:
            used = machine.peak_resident() - before
        sae = SAE.load_from_disk(f"{folder}/run", device=args.device)
    model = tiny.load_hooked_transformer() if args.model is None else None
    if model is None:
        model = load_model("HookedTransformer", args.model, args.device)
    result = sm.evaluate(
        sae.to(torch.float32),
        model.to(args.device),
        tiny.text.dataset("held_out"),
        n_tokens=20_000,
        n_ce_tokens=0,
    )
    return {
        "tokens_per_second": rate,
        "bytes": used,
        "fvu": [prefix.fvu for prefix in result.prefixes],
        "l0": result.prefixes[-1].l0,
    }


def table(medians: dict[str, dict[str, Any]]) -> Table:
    """Every setting beside float32."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("setting")
    for heading in ("tokens/s", "", "memory", "FVU", "of float32's", "L0"):
        made.add_column(heading, justify="right", no_wrap=True)
    base = medians[BASE]
    for name, row in medians.items():
        made.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}×",
            f"{row['bytes'] / 1e6:,.0f} MB",
            f"{row['fvu'][-1]:.4f}",
            f"{row['fvu'][-1] / base['fvu'][-1]:.3f}",
            f"{row['l0']:.1f}",
        )
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a model TransformerLens knows; default: the embedded tiny one")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=100 * 1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="names of settings; float32 is always among them")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if args.model is None else "0")
    known = settings(args.device)
    if args.measure:
        print(json.dumps(measure(args, known[args.measure])))
        return
    names = [name for name in known if args.only is None or name in (*args.only, BASE)]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    console = Console()
    for repeat in range(args.repeats):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.precision", *sys.argv[1:], "--measure", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
        console.print(f"round {repeat + 1} of {args.repeats}: done", style="dim")
    medians = {
        name: {
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in found),
            "bytes": statistics.median(row["bytes"] for row in found),
            "fvu": [statistics.median(values) for values in zip(*(row["fvu"] for row in found), strict=True)],
            "l0": statistics.median(row["l0"] for row in found),
        }
        for name, found in rows.items()
    }
    console.print(table(medians))
    described = machine.describe(args.device)
    console.print(described)
    if args.json:
        result = {"machine": described, "settings": vars(args), "medians": medians, "rounds": rows}
        args.json.write_text(json.dumps(result, indent=2, default=str))


if __name__ == "__main__":
    main()
