"""Fixtures shared by all tests. No test reaches for the network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many processes as cores: threads of theirs would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import hypothesis
import pytest
import torch
from transformer_lens import HookedTransformer

import saelens_matryoshka  # noqa: F401  (registers the architectures)
from saelens_matryoshka import tiny
from saelens_matryoshka.cache import write_cache
from tests.cache.helpers import settings as small_cache

# The same examples in every run: a failure is a change's own.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def tiny_model() -> HookedTransformer:
    """The embedded language model, norms not folded. Shared: do not change it."""
    return tiny.load_hooked_transformer()


@pytest.fixture(scope="session")
def token_dataset() -> datasets.Dataset:
    """Random tokens of the embedded model's vocabulary, 400 prompts of 32."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 1000, (400, 32), generator=generator)
    tokens[:, 0] = 0
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.fixture(scope="session")
def cache_folder(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """In float32. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("cache") / "float32"
    write_cache(folder, tiny_model, small_cache(), token_dataset, progress=False)
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
