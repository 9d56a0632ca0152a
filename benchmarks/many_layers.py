"""What N layers in lockstep cost, against N runs alone, and how much of it is the language model.

The same transcoders on the same text, once each alone and once together; the weights that come out are
compared too. Time is CPU time of one thread (other work on the machine does not count), of the training loop:
without loading and saving.

    python -m benchmarks.many_layers
    python -m benchmarks.many_layers --model gpt2-shaped --layers 12
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

import saelens_matryoshka as sm
from benchmarks import machine
from saelens_matryoshka import tiny
from saelens_matryoshka.layers import train_layers

_VOCAB = 50257


def gpt2_shaped() -> HookedTransformer:
    """GPT-2 small's sizes, random weights."""
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_ctx=1024,
        d_head=64,
        n_heads=12,
        d_mlp=3072,
        d_vocab=_VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
    )
    return HookedTransformer(config).eval()


def config(model: HookedTransformer, layer: int, args: argparse.Namespace) -> Any:
    """A transcoder of one layer's MLP."""
    source, target = (sm.find_site(model, layer, site) for site in ("mlp_in", "mlp_out"))
    sae = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=model.cfg.d_model,
        d_sae=args.d_sae,
        k=args.k,
        hook_name_out=target.hook_name,
        input_gain="none" if source.gain is None else "norm_weight",
    )
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=args.model,
        hook_name=source.hook_name,
        dataset_path="random tokens",
        context_size=args.context,
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch,
        store_batch_size_prompts=8,
        n_batches_in_buffer=max(2 * args.batch // args.context, 2),
        n_eval_batches=0,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )


class Stopwatch:
    """CPU time of a call and, in it, of the language model."""

    def __init__(self, model: Any) -> None:
        self.model, self.run_with_cache = model, model.run_with_cache
        self.in_model = 0.0

    def time(self, run: Callable[[], Any]) -> tuple[Any, float, float]:
        """What `run` returns, its seconds, and those of the language model in it."""
        self.in_model = 0.0
        self.model.run_with_cache = self._timed
        started = time.process_time()
        try:
            result = run()
        finally:
            self.model.run_with_cache = self.run_with_cache
        return result, time.process_time() - started, self.in_model

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = self.run_with_cache(*args, **kwargs)
        self.in_model += time.process_time() - started
        return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", "gpt2-shaped"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=float, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16 * 1024)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = tiny.load_hooked_transformer() if args.model == "tiny" else gpt2_shaped()
    generator = torch.Generator().manual_seed(0)
    size = (2 * args.tokens // args.context + 64, args.context)
    tokens = torch.randint(3, min(model.cfg.d_vocab, 1000), size, generator=generator)
    text = datasets.Dataset.from_dict({"input_ids": tokens.tolist()})
    stopwatch = Stopwatch(model)
    configs = {f"mlp-{layer}": config(model, layer, args) for layer in range(args.layers)}

    def alone(cfg: Any) -> Any:
        return LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text).run()

    single: dict[str, tuple[float, float]] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, cfg in configs.items():
        torch.manual_seed(0)
        sae, seconds, in_model = stopwatch.time(lambda cfg=cfg: alone(cfg))
        single[name], weights[name] = (seconds, in_model), sae.W_enc.detach().clone()
    torch.manual_seed(0)
    runners, together, model_together = stopwatch.time(
        lambda: train_layers(configs, override_model=model, override_dataset=text)
    )
    equal = all(torch.equal(runners[name].sae.W_enc, weights[name]) for name in configs)
    total, model_total = (sum(values) for values in zip(*single.values(), strict=True))

    table = Table(
        title=f"{args.layers} transcoders, {args.model}, d_sae={args.d_sae}, k={args.k:g}, "
        f"batch={args.batch}, {args.tokens:,} tokens each"
    )
    for heading in ("", "CPU s", "of which language model", "of the runs alone"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {f"{args.layers} runs alone": (total, model_total), "in lockstep": (together, model_together)}
    for name, (seconds, in_model) in rows.items():
        table.add_row(
            name, f"{seconds:.1f}", f"{in_model:.1f} ({in_model / seconds:.0%})", f"{seconds / total:.2f}×"
        )
    console = Console()
    console.print(table)
    console.print(f"bit-identical weights: {equal}")
    described = machine.describe("cpu")
    console.print(described)
    if args.json:
        figures = {name: {"seconds": s, "language_model": m} for name, (s, m) in {**single, **rows}.items()}
        result = {
            "machine": described,
            "settings": vars(args),
            "cpu_seconds": figures,
            "bit_identical": equal,
        }
        args.json.write_text(json.dumps(result, indent=2, default=str))


if __name__ == "__main__":
    main()
