"""Tokens per second of a whole run of SAELens's runner, language model included: ours beside stock.

Both train an SAE of the same widths on the same hook of the same model, in alternation, each run in the same
process; the median of their rates counts. The rate is of the training loop, without loading and saving.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --model gpt2 --hook blocks.8.hook_resid_pre --d-sae 12288 --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
)
from sae_lens.load_model import load_model

import saelens_matryoshka as sm
from benchmarks import machine
from saelens_matryoshka import tiny


def run(name: str, model: Any, args: argparse.Namespace) -> float:
    """Tokens per second of one run."""
    sae: dict[str, Any] = {
        "d_in": model.cfg.d_model,
        "d_sae": args.d_sae,
        "k": args.k,
        "device": args.device,
        "matryoshka_widths": [args.d_sae // part for part in (8, 4, 2, 1)],
    }
    hook_name = args.hook
    config: Any
    if name == "stock matryoshka_batchtopk":
        config = MatryoshkaBatchTopKTrainingSAEConfig(**sae)
    elif name == "matryoshka_sae":
        config = sm.MatryoshkaTrainingSAEConfig(**sae)
    else:
        layer = model.cfg.n_layers // 2
        source, target = (sm.find_site(model, layer, site) for site in ("mlp_in", "mlp_out"))
        hook_name = source.hook_name
        config = sm.MatryoshkaTrainingTranscoderConfig(
            **sae,
            hook_name_out=target.hook_name,
            input_gain="none" if source.gain is None else "norm_weight",
        )
    cfg = LanguageModelSAERunnerConfig(
        sae=config,
        hook_name=hook_name,
        model_name=args.model or "tiny",
        dataset_path="the Python standard library",
        is_dataset_tokenized=False,
        context_size=min(256, model.cfg.n_ctx),
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch,
        store_batch_size_prompts=16,
        n_batches_in_buffer=max(32, 2 * args.batch // 256),
        device=args.device,
        autocast=args.autocast,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=model, override_dataset=tiny.text.dataset("train")
    )
    started: list[float] = []
    stock_step = SAETrainer.step

    def step(self: Any, batch: torch.Tensor) -> Any:
        if not started:  # the first batch fills the buffer and warms up
            result = stock_step(self, batch)
            started.append(time.perf_counter())
            return result
        return stock_step(self, batch)

    SAETrainer.step = step  # type: ignore[method-assign]
    try:
        runner.run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return (args.tokens - args.batch) / (time.perf_counter() - started[0])
    finally:
        SAETrainer.step = stock_step  # type: ignore[method-assign]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a model TransformerLens knows; default: the embedded tiny one")
    parser.add_argument("--hook", default="blocks.2.hook_resid_post", help="of the SAEs")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=60 * 2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    if args.model is None:
        model: Any = tiny.load_hooked_transformer().to(args.device)
    else:
        model = load_model("HookedTransformer", args.model, args.device)
    names = ("stock matryoshka_batchtopk", "matryoshka_sae", "matryoshka_transcoder")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            rates[name].append(run(name, model, args))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    table = Table(title=f"{args.model or 'tiny'}, d_sae={args.d_sae}, k={args.k:g}, batch={args.batch}")
    for heading in ("run", "tokens/s", "of stock"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, rate in medians.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / medians[names[0]]:.2f}×")
    console = Console()
    console.print(table)
    described = machine.describe(args.device)
    console.print(described)
    if args.json:
        result = {"machine": described, "settings": vars(args), "tokens_per_second": medians}
        args.json.write_text(json.dumps(result, indent=2, default=str))


if __name__ == "__main__":
    main()
