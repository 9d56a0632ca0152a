"""A small cache of the embedded model."""

from __future__ import annotations

from typing import Any

from saelens_matryoshka.cache import CacheSettings

SOURCE, TARGET = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"


def settings(**overrides: Any) -> CacheSettings:
    """2048 tokens in four files, and 256 held out."""
    fields: dict[str, Any] = {
        "model_name": "tiny",
        "hook_names": (TARGET, SOURCE),
        "dataset_path": "tokens",
        "training_tokens": 2048,
        "held_out_tokens": 256,
        "context_size": 32,
        "dtype": "float32",
        "store_batch_size_prompts": 8,
        "shard_bytes": 16 * 32 * (4 + 2 * 128 * 4),
    }
    return CacheSettings(**{**fields, **overrides})
