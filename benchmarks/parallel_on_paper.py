"""The table of docs/parallel.md: what a training step costs on GPUs that were assumed, not measured.

    python -m benchmarks.parallel_on_paper

Gemma-2-2B to layer 8, a transcoder of four levels in float32 under bf16 autocast. Counted are the arithmetic
of the language model and the encoder, passes over memory, and bytes given to collectives; an all-reduce sends
them twice.
"""

from __future__ import annotations

from typing import NamedTuple

FLOPS, MEMORY, NETWORK = 400e12, 2.5e12, 300e9
"""per second: operations in bf16, bytes of memory, bytes of NCCL among GPUs of a node or of all nodes"""
LANGUAGE_MODEL = 14e-3 / 4096
"""seconds for a row"""
D, K, LEVELS, BYTES, HALF = 2304, 96, 4, 4, 2


class Plan(NamedTuple):
    """A mesh of GPUs, and the rows of a step."""

    title: str
    d_sae: int
    copies: int
    shards: int
    rows: int


PLANS = [
    Plan("18k latents, data parallel on 8", 18_432, 8, 1, 8 * 4096),
    Plan("18k, data parallel on 64", 18_432, 64, 1, 64 * 4096),
    Plan("1M, 8 shards", 1 << 20, 1, 8, 8192),
    Plan("1M, 64 shards", 1 << 20, 1, 64, 8192),
    Plan("1M, 64 shards", 1 << 20, 1, 64, 65_536),
    Plan("1M, 8 × 8", 1 << 20, 8, 8, 65_536),
    Plan("131k, 64 shards", 1 << 17, 1, 64, 65_536),
    Plan("131k, 8 × 8", 1 << 17, 8, 8, 65_536),
]


def costs(plan: Plan) -> dict[str, str]:
    """A column of the table."""
    rows, latents = plan.rows / plan.copies, plan.d_sae / plan.shards
    gradient = 2 * D * latents * BYTES
    parts = LEVELS * rows * D * BYTES
    entries = rows * K / plan.shards * D * HALF
    within = (2 * parts + rows * 2 * D * BYTES) / NETWORK if plan.shards > 1 else 0.0
    # the shards of a node average theirs at the same time, over one network
    between = 2 * gradient * plan.shards / NETWORK if plan.copies > 1 else 0.0
    seconds = {
        "language model": rows / plan.shards * LANGUAGE_MODEL,
        "encoder product": 2 * rows * latents * D / FLOPS,
        # entries are gathered four times, the encoder's output written and read, parts touched eight times
        "sparse parts, selection": (4 * entries + 2 * rows * latents * HALF + 8 * parts) / MEMORY,
        # Adam reads four tensors and writes three; clipping and averaging are a pass and a half each
        "averaging, clipping, Adam": (10 + 2 * (plan.copies > 1)) * gradient / MEMORY,
        "communication of shards": within,
        "communication of copies": between,
    }
    together = sum(seconds.values())
    rate = plan.rows / together
    return {
        "GPUs": f"{plan.copies * plan.shards}",
        "rows of a step, all GPUs": f"{plan.rows:,}",
        **{name: f"{1e3 * value:.1f} ms" if value else "" for name, value in seconds.items()},
        "together": f"{1e3 * together:.0f} ms",
        "tokens per second, all GPUs": f"{rate / 1e6:.2g}M",
        "10⁹ tokens": f"{1e9 / rate / 60:.2g} min",
        "weights, gradient, Adam": f"{4 * gradient / 1e9:.1f} GB",
        "parts of the rows": f"{parts / 1e9:.2g} GB",
    }


def main() -> None:
    columns = [costs(plan) for plan in PLANS]
    print("| per step and GPU | " + " | ".join(plan.title for plan in PLANS) + " |")
    print("|---" * (len(PLANS) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
