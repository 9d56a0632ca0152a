"""A small cache of the embedded model, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformer_lens import HookedTransformer

from saelens_matryoshka.cache import CacheSettings, write_cache

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


@pytest.fixture(scope="session")
def cache_folder(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """In float32. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("cache") / "float32"
    write_cache(folder, tiny_model, settings(), token_dataset, progress=False)
    return folder
