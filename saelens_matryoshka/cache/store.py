"""SAELens's runner on a cache: a store that reads it, and a stand-in for the language model.

With `use_cached_activations=True` and `cached_activations_path` a cache's folder, the runner trains any of
our architectures from it. It loads the language model all the same, unless it is given
`override_model=CachedModel(open_cache(folder))`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.hook_points import HookedRootModule, HookPoint
from typing_extensions import override

from saelens_matryoshka.architectures import MatryoshkaTrainingTranscoderConfig
from saelens_matryoshka.cache.manifest import MANIFEST
from saelens_matryoshka.cache.reader import ActivationCache, CachedBatches, open_cache
from saelens_matryoshka.evaluation.evaluator import evaluate_activations
from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.ops import ALONE, Group
from saelens_matryoshka.sites import Site
from saelens_matryoshka.store.pairs import warn_of_same_tensor
from saelens_matryoshka.store.reading import Reading
from saelens_matryoshka.store.resumable import ResumableStore

_HELD_OUT_BATCH = 4096
_CACHE = "cache"  # in the metadata of a checkpoint's file


class CachedModel(HookedRootModule):
    """Has the hooks of a cache and the weights of their norms, and cannot be run."""

    tokenizer = None

    def __init__(self, cache: ActivationCache) -> None:
        super().__init__()
        self.cache_folder = cache.folder
        for hook in cache.manifest.hooks:
            *path, leaf = hook.split(".")
            module: nn.Module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, HookPoint())
            for kind, name in (("gain", "w"), ("offset", "b")):
                if (tensor := cache.gains.get(f"{hook}.{kind}")) is not None:
                    module.register_buffer(name, tensor)
        self.setup()

    @override
    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(
            f"This run reads activations from the cache {self.cache_folder}, and there is no language model. "
            "For CE recovered, evaluate the saved model: saelens-matryoshka eval."
        )


class CachedActivationsStore(ResumableStore):
    """Batches for one SAE or transcoder from a cache: `[batch, d_in]`, or `[source | target]`.

    Built with `cached_store`.
    """

    cache: ActivationCache
    reading: Reading
    batches: CachedBatches

    @override
    def load_cached_activation_dataset(self) -> None:
        return None  # the columns are not those of SAELens's caches

    @override
    def read_share(self, rank: int, size: int) -> None:
        """Read one of `size` parts of every batch."""
        self.rank, self.size = rank, size
        self.batches.read_share(rank, size)

    @override
    def require_buffer(self) -> None:
        """Its rows were shuffled when they were written: there is no buffer."""

    @override
    def __next__(self) -> torch.Tensor:
        with self._lock:
            batch = self.reading(next(self.batches))
            self._ahead.append(batch)
            return batch

    @override
    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Write how many batches have been trained on, and of which cache: all there is to say of a place."""
        with self._lock:
            position = torch.tensor(self.batches.position - len(self._ahead))
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        save_file({"position": position}, path, {_CACHE: self.cache.manifest.fingerprint()})

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go back to what `save_to_checkpoint` wrote.

        Raises:
            ValueError: it is not of this cache.
        """
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        saved = load_file(path)
        if "position" not in saved:
            raise ValueError(
                f"The checkpoint {checkpoint_path} is of a run on the language model, and cannot be "
                f"continued from the cache {self.cache.folder}."
            )
        with safe_open(path, framework="pt") as file:
            of = (file.metadata() or {}).get(_CACHE)
        if of not in (None, self.cache.manifest.fingerprint()):
            raise ValueError(
                f"The cache {self.cache.folder} is not the one this run was started with: it has other rows. "
                "Give the same cache."
            )
        with self._lock:
            self._ahead.clear()
            self.batches.position = int(saved["position"])


def is_cache(path: str | Path | None) -> bool:
    """Whether a folder is one of our caches (and not one of SAELens's, which has no manifest)."""
    return path is not None and (Path(path) / MANIFEST).is_file()


def cached_store(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> CachedActivationsStore:
    """The store of a runner config with `use_cached_activations`.

    Raises:
        CacheError: the cache is damaged, or does not fit the config.
    """
    assert cfg.cached_activations_path is not None
    cache = open_cache(cfg.cached_activations_path)
    cache.manifest.require_fit(cfg, cache.folder)
    device = torch.device(cfg.act_store_device or cfg.device)
    reading = reading_of(cfg, cache)
    target = reading.target_hook
    if target and {cfg.hook_name, target} in map(set, cache.manifest.same_tensors):
        warn_of_same_tensor(cfg.hook_name, target)
    store = CachedActivationsStore(
        model=model,
        dataset=None,
        streaming=False,
        hook_name=cfg.hook_name,
        hook_head_index=None,
        context_size=cfg.context_size,
        d_in=cfg.sae.d_in,
        n_batches_in_buffer=cfg.n_batches_in_buffer,
        total_training_tokens=cfg.training_tokens,
        store_batch_size_prompts=cfg.store_batch_size_prompts,
        train_batch_size_tokens=cfg.train_batch_size_tokens,
        prepend_bos=cfg.prepend_bos,
        normalize_activations=cfg.sae.normalize_activations,
        device=device,
        dtype=cfg.dtype,
        cached_activations_path=cfg.cached_activations_path,
        seqpos_slice=cfg.seqpos_slice,
    )
    store.cache, store.reading = cache, reading
    store.batches = cache.batches(
        reading.hooks, cfg.train_batch_size_tokens, seed=cfg.seed, device=device, dtype=store.dtype
    )
    return store


def reading_of(cfg: LanguageModelSAERunnerConfig[Any], cache: ActivationCache) -> Reading:
    """What a config's dictionary reads of a cache."""
    if not isinstance(cfg.sae, MatryoshkaTrainingTranscoderConfig):
        return Reading(Site(cfg.hook_name))
    with_gain = cfg.sae.input_gain == "norm_weight"
    return Reading(cache.site(cfg.hook_name, with_gain=with_gain), cfg.sae.hook_name_out)


def evaluate_cached(
    sae: SAE[Any], cache: ActivationCache, *, with_redundancy: bool = True, group: Group = ALONE
) -> EvalResult:
    """FVU, L0 and dead latents of every prefix on the held-out rows of a cache.

    Args:
        sae: SAE or transcoder, ours or stock, that reads the raw hook.
        cache: Of the language model it was trained on.
        with_redundancy: As in `sm.evaluate`.
        group: As in `sm.evaluate`.

    Raises:
        ValueError: the cache has no such hook or no held-out rows, or is of another frame.
    """
    if not cache.manifest.held_out:
        raise ValueError(
            f"The cache {cache.folder} has no held-out rows: it was written with held_out_tokens=0."
        )
    metadata = sae.cfg.metadata
    source, target = metadata.hook_name, metadata.hook_name_out or metadata.hook_name

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        hooks = list(dict.fromkeys([source, target]))
        for rows in cache.held_out(hooks, _HELD_OUT_BATCH, device=sae.device, dtype=torch.float32):
            yield rows[source], rows[target]

    return evaluate_activations(
        sae, CachedModel(cache), pairs(), with_redundancy=with_redundancy, group=group
    )
