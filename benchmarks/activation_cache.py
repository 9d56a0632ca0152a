"""What a cache on disk costs and gives: writing, reading, and training from it.

1. Writing: tokens per second with the language model, and what the model alone gives.
2. Reading shuffled batches: from files that have just been dropped from the page cache, and again from it; of
   the tiny model's two hooks, and of two hooks as wide as Gemma-2-2B's (random values).
3. Training from each dtype with several seeds: FVU on the same held-out rows in float32.

Rates are by the clock, and where it says CPU, by CPU time of one thread.

    python -m benchmarks.activation_cache
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from benchmarks import machine
from saelens_matryoshka import tiny
from saelens_matryoshka.cache import CachedModel, CacheSettings, open_cache, write_cache
from saelens_matryoshka.cache.encoding import DTYPES
from saelens_matryoshka.cache.store import evaluate_cached

LAYER = 2
SOURCE, TARGET = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"


class RandomModel(torch.nn.Module):
    """Two hooks of random values and no work."""

    hooks = ("source", "target")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.tokenizer = None
        self.hook_dict = dict.fromkeys(self.hooks)
        self.embed = torch.nn.Linear(1, 1)

    def _values(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {hook: torch.randn(*tokens.shape, self.width) for hook in self.hooks}

    def run_with_hooks(self, tokens: torch.Tensor, fwd_hooks: Any) -> None:
        """Call the hooks."""
        values = self._values(tokens)
        for name, hook in fwd_hooks:
            hook(values[name], None)

    def run_with_cache(self, tokens: torch.Tensor, **_: Any) -> tuple[None, dict[str, torch.Tensor]]:
        """Random activations."""
        return None, self._values(tokens)


def drop_from_page_cache(folder: Path) -> None:
    """So that the next read is from the disk."""
    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(folder: Path, batch: int) -> dict[str, float]:
    """Rates of one epoch of shuffled batches."""
    rates: dict[str, float] = {}
    cache = open_cache(folder)
    for name in ("cold", "warm"):
        if name == "cold":
            del cache
            drop_from_page_cache(folder)
            cache = open_cache(folder)
        batches = cache.batches(list(cache.manifest.hooks), batch, seed=0, dtype=torch.float32)
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches.batches_per_epoch):
            next(batches)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        tokens = batches.batches_per_epoch * batch
        per_token = sum(shard.bytes for shard in cache.manifest.train.values()) / cache.manifest.rows("train")
        rates[f"{name} tokens/s"], rates[f"{name} GB/s"] = (
            tokens / seconds,
            tokens * per_token / seconds / 1e9,
        )
        rates[f"{name} CPU tokens/s"] = tokens / cpu
    return rates


def settings(**overrides: Any) -> CacheSettings:
    """Of the embedded model's MLP of layer 2."""
    fields: dict[str, Any] = {
        "model_name": "tiny",
        "hook_names": (SOURCE, TARGET),
        "dataset_path": "the Python standard library",
        "context_size": 256,
        "exclude_special_tokens": True,
        "store_batch_size_prompts": 8,
    }
    return CacheSettings(**{**fields, **overrides})


def train(folder: Path, held_out: Path, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """FVU and L0 on the held-out rows of another cache."""
    cache = open_cache(folder)
    sae = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=128, d_sae=args.d_sae, k=args.k, hook_name_out=TARGET, input_gain="norm_weight"
    )
    size = {"training_tokens": args.train_tokens, "train_batch_size_tokens": 1024}
    with tempfile.TemporaryDirectory() as out:
        cfg = LanguageModelSAERunnerConfig(
            sae=sae,
            hook_name=SOURCE,
            **cache.manifest.runner_fields(),
            **size,
            **sm.recommended_runner_fields(sae, **size),
            use_cached_activations=True,
            cached_activations_path=str(folder),
            seed=seed,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=out,
            verbose=False,
        )
        torch.manual_seed(seed)
        LanguageModelSAETrainingRunner(cfg, override_model=CachedModel(cache)).run()
        full = evaluate_cached(SAE.load_from_disk(out), open_cache(held_out)).prefixes[-1]
    return full.fvu, full.l0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000, help="in the cache of the tiny model")
    parser.add_argument("--train-tokens", type=int, default=450_000)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=float, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--wide", type=int, default=2304, help="width of the random hooks")
    parser.add_argument("--wide-tokens", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=4096, help="of the reading test")
    parser.add_argument("--folder", type=Path, default=Path("output/activation_cache_benchmark"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    console = Console()
    shutil.rmtree(args.folder, ignore_errors=True)
    result: dict[str, Any] = {"machine": machine.describe("cpu"), "settings": vars(args)}

    model, text = tiny.load_hooked_transformer(), tiny.text.dataset("train")
    result["writing"], result["reading"] = {}, {}
    for dtype in DTYPES:
        started, cpu = time.perf_counter(), time.process_time()
        made = settings(dtype=dtype, training_tokens=args.tokens, held_out_tokens=50_000)
        manifest = write_cache(args.folder / dtype, model, made, text, progress=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        tokens = manifest.rows("train") + manifest.rows("held_out")
        result["writing"][dtype] = {
            "tokens/s": tokens / seconds,
            "CPU tokens/s": tokens / cpu,
            "bytes per token": manifest.bytes / tokens,
        }
        result["reading"][f"tiny, {dtype}"] = reading(args.folder / dtype, args.batch)

    prompts = torch.randint(3, 1000, (16, 256))
    names = [SOURCE, TARGET]
    cpu = time.process_time()
    with torch.no_grad():
        for _ in range(5):
            model.run_with_cache(prompts, names_filter=names, stop_at_layer=LAYER + 1)
    result["live"] = {"CPU tokens/s": 5 * prompts.numel() / (time.process_time() - cpu)}

    random = datasets.Dataset.from_dict({"input_ids": torch.ones(300, 256, dtype=torch.long).tolist()})
    for dtype in DTYPES:
        folder = args.folder / f"wide-{dtype}"
        wide = settings(
            dtype=dtype,
            hook_names=RandomModel.hooks,
            training_tokens=args.wide_tokens,
            held_out_tokens=0,
            exclude_special_tokens=False,
            shard_bytes=1 << 27,
        )
        write_cache(folder, RandomModel(args.wide), wide, random, progress=False)
        result["reading"][f"2 × {args.wide}, {dtype}"] = reading(folder, args.batch)
        shutil.rmtree(folder)

    result["training"] = {}
    for dtype in DTYPES:
        runs = [train(args.folder / dtype, args.folder / "float32", args, seed) for seed in range(args.seeds)]
        result["training"][dtype] = {"fvu": [fvu for fvu, _ in runs], "l0": [l0 for _, l0 in runs]}
    _show(console, result, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, default=str))
    shutil.rmtree(args.folder)


def _show(console: Console, result: dict[str, Any], args: argparse.Namespace) -> None:
    live = result["live"]["CPU tokens/s"]
    table = Table(title="Writing (tiny model, 2 hooks of 128)")
    for heading in ("dtype", "bytes/token", "tokens/s", "CPU tokens/s"):
        table.add_column(heading, justify="right")
    for dtype, row in result["writing"].items():
        table.add_row(
            dtype, f"{row['bytes per token']:.0f}", f"{row['tokens/s']:,.0f}", f"{row['CPU tokens/s']:,.0f}"
        )
    console.print(table, f"the model's forward pass alone: {live:,.0f} tokens per CPU second")
    table = Table(title=f"Reading shuffled batches of {args.batch}")
    for heading in (
        "hooks, dtype",
        "GB/s cold",
        "GB/s warm",
        "tokens/s cold",
        "tokens/s warm",
        "CPU tokens/s",
    ):
        table.add_column(heading, justify="right")
    for name, row in result["reading"].items():
        table.add_row(
            name,
            *(f"{row[f'{how} GB/s']:.2f}" for how in ("cold", "warm")),
            *(f"{row[f'{how} tokens/s']:,.0f}" for how in ("cold", "warm")),
            f"{row['warm CPU tokens/s']:,.0f}",
        )
    console.print(table)
    table = Table(title=f"Training, {args.train_tokens:,} tokens, {args.seeds} seeds, same held-out rows")
    for heading in ("cache", "FVU", "of float32's", "L0"):
        table.add_column(heading, justify="right")
    base = result["training"]["float32"]["fvu"]
    for dtype, row in result["training"].items():
        ratios = [fvu / other for fvu, other in zip(row["fvu"], base, strict=True)]
        spread = f" ({min(ratios):.4f} to {max(ratios):.4f})" if dtype != "float32" else ""
        table.add_row(
            dtype,
            f"{statistics.mean(row['fvu']):.4f}",
            f"{statistics.mean(ratios):.4f}{spread}",
            f"{statistics.mean(row['l0']):.2f}",
        )
    console.print(table, result["machine"])


if __name__ == "__main__":
    main()
