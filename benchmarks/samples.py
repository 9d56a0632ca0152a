"""Tokens per second of collecting samples, beside the least that it could take.

Samples need of the language model its pass up to the hook, and of every token the encoder's dense product:
these two alone, the product into memory that is there already, are the floor. Beside it the whole forward
pass, and the floor with SAELens's `encode` in place of the bare product. The model is random: its speed does
not depend on what it has learned. The thresholds are set so that about `k` latents are active per token. Each
repeat runs all of them in turn, and the median counts. Memory is the process's at its peak so far (Linux), on
a GPU torch's.

    python -m benchmarks.samples
    python -m benchmarks.samples --d-model 128 --layers 4 --hook-layer 2 --d-vocab 4096 --k 64 --repeats 5
    python -m benchmarks.samples --d-model 2304 --layers 26 --hook-layer 12 --device cuda --tokens 1000000
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

from benchmarks import machine
from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.report import collect_samples

_FLOOR = "to the hook, and the product"


def make_model(args: argparse.Namespace) -> HookedTransformer:
    """A random model of GPT-2's shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = HookedTransformerConfig(
            n_layers=args.layers,
            d_model=args.d_model,
            n_ctx=args.context_size,
            d_head=64,
            n_heads=args.d_model // 64,
            d_mlp=4 * args.d_model,
            d_vocab=args.d_vocab,
            act_fn="gelu_new",
            device=args.device,
            seed=0,
        )
        return HookedTransformer(config).eval()


@torch.no_grad()
def make_sae(args: argparse.Namespace, model: HookedTransformer, tokens: torch.Tensor) -> JumpReLUSAE:
    """Random directions, of which about `k` are active on a token."""
    hook = f"blocks.{args.hook_layer}.hook_resid_post"
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=args.d_model, d_sae=args.d_sae, device=args.device))
    sae.cfg.metadata = SAEMetadata(hook_name=hook, context_size=args.context_size)
    sae.W_dec.data.normal_()
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    for parameter in (sae.b_enc, sae.b_dec, sae.threshold):
        parameter.data.zero_()
    acts = sae.encode(hook_activations(model, tokens[:4], [hook])[hook].flatten(0, 1))
    sae.threshold.data.fill_(acts.topk(args.k + 1, dim=1).values[:, -1].mean().item())
    return sae


def peak_memory(device: str) -> float:
    """GB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return machine.peak_resident() / 1e9


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each, and the memory."""
    model = make_model(args)
    tokens = torch.randint(args.d_vocab, (-(-args.tokens // args.context_size), args.context_size))
    sae = make_sae(args, model, tokens.to(args.device))
    hook = sae.cfg.metadata.hook_name
    batches = [batch.to(args.device) for batch in tokens.split(args.batch)]
    product = torch.empty(args.context_size, args.d_sae, device=args.device)

    def floor() -> None:
        for batch in batches:
            for prompt in hook_activations(model, batch, [hook])[hook]:
                torch.mm(prompt, sae.W_enc, out=product[: len(prompt)])

    def encode() -> None:
        for batch in batches:
            for prompt in hook_activations(model, batch, [hook])[hook]:
                sae.encode(prompt)

    def sample() -> None:
        nonlocal found
        found = collect_samples(
            sae,
            model,
            tokens,
            n_tokens=tokens.numel(),
            batch_size_prompts=args.batch,
            exclude_special_tokens=False,
        )

    found: Any = None
    contestants: dict[str, Callable[[], Any]] = {
        "forward pass, whole": lambda: [model(batch) for batch in batches],
        "forward pass to the hook": lambda: [hook_activations(model, batch, [hook]) for batch in batches],
        _FLOOR: floor,
        "to the hook, and encode": encode,
        "samples": sample,
    }
    model(batches[0])  # warm
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, run in contestants.items():
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(tokens.numel() / (time.perf_counter() - started))
            memory.setdefault(name, peak_memory(args.device))
    return {
        "tokens": tokens.numel(),
        "l0": found.fired.sum().item() / found.n_tokens,
        "examples": int((found.top.positions >= 0).sum() + (found.intervals.positions >= 0).sum()),
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "peak_memory_gb": memory,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-vocab", type=int, default=50257)
    parser.add_argument("--hook-layer", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=18432)
    parser.add_argument("--k", type=int, default=96)
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="prompts per forward pass")
    parser.add_argument("--tokens", type=int, default=20 * 2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    result = measure(args)
    title = f"d_model={args.d_model}, {args.layers} layers, d_sae={args.d_sae}, {result['tokens']:,} tokens"
    table = Table(title=title)
    for heading in ("", "tokens/s", "of the floor", "peak memory so far"):
        table.add_column(heading, justify="right" if heading else "left")
    rates = result["tokens_per_second"]
    for name, rate in rates.items():
        share = rate / rates[_FLOOR]
        table.add_row(name, f"{rate:,.0f}", f"{share:.2f}×", f"{result['peak_memory_gb'][name]:.2f} GB")
    console = Console()
    console.print(table)
    console.print(f"L0 {result['l0']:.1f}; {result['examples']:,} examples kept")
    described = machine.describe(args.device)
    console.print(described)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": described, "settings": vars(args), **result}, indent=2, default=str)
        )


if __name__ == "__main__":
    main()
