"""Activations on disk: written once with the language model, trained from many times without it.

A cache is a folder with an HF dataset in it (`datasets.load_from_disk` reads it) and a manifest that says
what the activations are of. Rows are tokens, columns are hooks.
"""

from saelens_matryoshka.cache.manifest import CacheError, CacheSettings, Manifest
from saelens_matryoshka.cache.reader import ActivationCache, CachedBatches, open_cache, verify_cache
from saelens_matryoshka.cache.store import CachedActivationsStore, CachedModel
from saelens_matryoshka.cache.writer import write_cache

__all__ = [
    "ActivationCache",
    "CacheError",
    "CacheSettings",
    "CachedActivationsStore",
    "CachedBatches",
    "CachedModel",
    "Manifest",
    "open_cache",
    "verify_cache",
    "write_cache",
]
