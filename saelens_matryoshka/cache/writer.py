"""Write a cache: the language model once over the text, its hooks to disk.

A shard holds a fixed range of prompts, its rows shuffled. So a shard does not depend on the others: what a
killed process has left is kept, what is missing or damaged is made, and the result is the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.config import HfDataset
from safetensors.torch import save_file
from tqdm.auto import tqdm

from saelens_matryoshka.cache.encoding import Rows, encode, row_bytes, to_arrow
from saelens_matryoshka.cache.manifest import (
    GAINS,
    MANIFEST,
    CacheError,
    CacheSettings,
    Hook,
    Manifest,
    Split,
    damage,
    describe_file,
)
from saelens_matryoshka.evaluation.activations import in_eval_mode
from saelens_matryoshka.evaluation.tokens import as_dataset, require_context_size, special_token_ids
from saelens_matryoshka.files.atomic import is_left_aside, whole_file, write_atomically
from saelens_matryoshka.files.fingerprint import hash_of_model
from saelens_matryoshka.files.locks import alone
from saelens_matryoshka.seams import split_off_prompts, token_device, token_sequences
from saelens_matryoshka.sites import check_hook, make_readable, norm_frame, norm_gain, probe
from saelens_matryoshka.versions import package_versions

_LOCK = ".writing"


@torch.no_grad()
def write_cache(
    folder: Path | str,
    model: Any,
    settings: CacheSettings,
    dataset: HfDataset | list[Any] | None = None,
    *,
    progress: bool = True,
) -> Manifest:
    """Write a cache, or what is missing of it.

    Args:
        folder: Where. It must not exist, be empty, or hold the same cache, complete or not.
        model: The language model.
        settings: What to write.
        dataset: The text, in place of `settings.dataset_path`; a list of texts or rows will do.
        progress: Show a bar.

    Returns:
        What the cache holds.

    Raises:
        CacheError: the folder holds something else, or another process is writing it.
        ValueError: a hook does not exist, the prompts are too long for the model, or the text is empty or
            no dataset.
    """
    folder = Path(folder)
    require_own_folder(folder)
    require_context_size(settings.context_size, model)
    dataset = None if dataset is None else as_dataset(dataset, "dataset")
    for hook in settings.hook_names:
        check_hook(model, hook, "hook_names")
        make_readable(model, hook)
    with in_eval_mode(model):
        manifest, gains = _describe(model, settings)
        folder.mkdir(parents=True, exist_ok=True)
        in_use = CacheError(f"{folder} is being written by another process.")
        with alone(folder / _LOCK, in_use):
            _write(folder, model, settings, dataset, manifest, gains, progress)
    return Manifest.load(folder)


def _write(
    folder: Path,
    model: Any,
    settings: CacheSettings,
    dataset: HfDataset | None,
    manifest: Manifest,
    gains: dict[str, torch.Tensor],
    progress: bool,
) -> None:
    manifest = _continued(folder, manifest)
    if manifest.complete:
        return
    manifest.save(folder)
    save_file(gains, folder / GAINS)
    manifest.others[GAINS] = describe_file(folder / GAINS, 0)
    store = _store(model, settings, dataset)
    work = _Writing(folder, model, settings, store, manifest)
    n_held_out = -(-settings.held_out_tokens // settings.context_size)
    held_out = split_off_prompts(store, n_held_out, leaving=1) if n_held_out else torch.empty(0)
    if held_out is None:
        raise ValueError(
            f"held_out_tokens={settings.held_out_tokens} leaves nothing of {settings.dataset_path!r} to "
            "train on: it has too little text. Lower it."
        )
    n_train = -(-settings.training_tokens // settings.context_size)
    bar = tqdm(
        total=(n_train + n_held_out) * settings.context_size,
        unit="tok",
        unit_scale=True,
        disable=not progress,
        desc="writing",
    )
    with bar, work:
        work.write("held_out", iter(held_out), n_held_out, bar)
        with contextlib.closing(token_sequences(store)) as sequences:
            work.write("train", sequences, n_train, bar)
    for split in ("train", "held_out"):
        _describe_dataset(folder, split, manifest)
    if not manifest.train:
        raise ValueError(f"dataset_path={settings.dataset_path!r} gives no row of activations to write.")
    splits = [split for split in ("train", "held_out") if manifest.shards(split)]
    write_atomically(folder / "dataset_dict.json", json.dumps({"splits": splits}))
    manifest.complete = True
    manifest.save(folder)


class _Writing:
    """Runs the model over the prompts of the shards that are missing, while the last one is being written."""

    def __init__(
        self, folder: Path, model: Any, settings: CacheSettings, store: ActivationsStore, manifest: Manifest
    ) -> None:
        self.folder, self.model, self.settings, self.store = folder, model, settings, store
        self.manifest = manifest
        self.excluded = torch.tensor(manifest.excluded_token_ids, dtype=torch.long)
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._wait()
        finally:
            self._writer.shutdown(wait=True)

    def write(self, split: Split, prompts: Iterator[torch.Tensor], n_prompts: int, bar: Any) -> None:
        """Make the shards of a split that are not there yet, of prompts `[context_size]`."""
        size = self.manifest.prompts_per_shard
        for index, start in enumerate(range(0, n_prompts, size)):
            part = list(itertools.islice(prompts, min(size, n_prompts - start)))
            if not part:
                return
            name = f"{split}/data-{index:05d}.arrow"
            if name not in self.manifest.shards(split):
                table = self._table(part, f"{self.settings.seed} {name}", bar)
                if len(table):
                    self._wait()
                    self._pending = self._writer.submit(self._save, split, name, table)
            else:
                bar.update(len(part) * self.settings.context_size)

    def _table(self, prompts: list[torch.Tensor], seed: str, bar: Any) -> pa.Table:
        hooks: dict[str, list[Rows]] = {hook: [] for hook in self.manifest.hooks}
        tokens: list[torch.Tensor] = []
        device = token_device(self.model)
        for batch in torch.stack(prompts).split(self.settings.store_batch_size_prompts):
            activations = self.store.get_multi_hook_activations(batch.to(device))
            ids = batch[:, slice(*self.settings.seqpos_slice)].flatten().cpu()
            keep = (~torch.isin(ids, self.excluded)).nonzero().flatten()
            tokens.append(ids[keep])
            for hook, parts in hooks.items():
                rows = activations[hook].flatten(0, 1)
                rows = rows[keep.to(rows.device)]
                if not bool(torch.isfinite(rows.sum(dtype=torch.float32))):
                    raise ValueError(
                        f"hook {hook!r} gives NaN or Inf. A model in float16, or autocast_lm, may overflow: "
                        "run it in bfloat16 or float32."
                    )
                encoded = encode(rows, self.settings.dtype)
                parts.append(Rows(*(None if x is None else x.cpu() for x in encoded)))  # type: ignore[arg-type]
            bar.update(batch.numel())
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
        ids = torch.cat(tokens)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(number))
        columns: dict[str, Rows] = {}
        for hook in self.manifest.hooks:
            parts = hooks.pop(hook)
            scales = [part.scale for part in parts if part.scale is not None]
            columns[hook] = Rows(
                torch.cat([part.values for part in parts])[order],
                torch.cat(scales)[order] if scales else None,
            )
        return to_arrow(columns, ids[order], self.settings.dtype)

    def _save(self, split: Split, name: str, table: pa.Table) -> None:
        """A whole file or none, and then its line in the manifest."""
        with whole_file(self.folder / name) as new:
            with new.open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            shard = describe_file(new, len(table))
        shards = self.manifest.shards(split) | {name: shard}
        setattr(self.manifest, split, dict(sorted(shards.items())))
        self.manifest.save(self.folder)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


# ---- what the cache is of


def _describe(model: Any, settings: CacheSettings) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """The manifest of a cache with nothing in it yet, and the norms' weights of its hooks."""
    seen = {hook: rows.flatten(2) for hook, rows in probe(model, settings.hook_names).items()}
    hooks = {hook: Hook(rows.shape[-1], norm_frame(model, hook)) for hook, rows in seen.items()}
    gains: dict[str, torch.Tensor] = {}
    for hook, described in hooks.items():
        if described.frame == "normalized":
            gain, offset = norm_gain(model, hook)
            gains[f"{hook}.gain"] = gain.cpu().float().contiguous()
            if offset is not None:
                gains[f"{hook}.offset"] = offset.cpu().float().contiguous()
    same = [
        [one, other] for one, other in itertools.combinations(seen, 2) if torch.equal(seen[one], seen[other])
    ]
    excluded = special_token_ids(model, settings.exclude_special_tokens)
    widths = {hook: described.width for hook, described in hooks.items()}
    prompt_bytes = row_bytes(widths, settings.dtype) * settings.context_size
    manifest = Manifest(
        settings=settings.identity(),
        hooks=hooks,
        same_tensors=same,
        model_fingerprint=hash_of_model(model),
        excluded_token_ids=[] if excluded is None else excluded.tolist(),
        prompts_per_shard=max(1, settings.shard_bytes // prompt_bytes),
        versions=package_versions(),
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return manifest, gains


def _store(model: Any, settings: CacheSettings, dataset: HfDataset | None) -> ActivationsStore:
    """SAELens's store: it reads and tokenizes the text, and runs the model."""
    try:
        return ActivationsStore.from_config_multi_hook(
            model,
            dataset=settings.dataset_path if dataset is None else dataset,
            hook_names=list(settings.hook_names),
            hook_d_ins=dict.fromkeys(settings.hook_names, 0),  # used by the stock mixing buffer alone
            streaming=settings.streaming,
            context_size=settings.context_size,
            total_training_tokens=0,
            store_batch_size_prompts=settings.store_batch_size_prompts,
            prepend_bos=settings.prepend_bos,
            device="cpu",
            model_kwargs=settings.model_kwargs,
            autocast_lm=settings.autocast_lm,
            seqpos_slice=settings.seqpos_slice,
            disable_concat_sequences=settings.disable_concat_sequences,
            sequence_separator_token=settings.sequence_separator_token,  # type: ignore[arg-type]
            use_chat_formatting=settings.use_chat_formatting,
        )
    except StopIteration:
        raise ValueError(f"dataset_path={settings.dataset_path!r}: the dataset is empty.") from None


# ---- the folder


def require_own_folder(folder: Path) -> None:
    """Refuse a place that holds something else than a cache.

    Raises:
        CacheError: it is a file, or a folder with other files in it.
    """
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file: name a folder.")
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        others = [path.name for path in folder.iterdir() if path.name != _LOCK and not is_left_aside(path)]
        if others:
            raise CacheError(f"{folder} holds something else ({others[0]}): name a new folder.")


def _continued(folder: Path, ours: Manifest) -> Manifest:
    """The manifest that is there, without its missing and damaged files; ours where there is none."""
    if not (folder / MANIFEST).is_file():
        return ours
    found = Manifest.load(folder)
    for key in found.settings.keys() | ours.settings.keys():
        old, new = found.settings.get(key), ours.settings.get(key)
        if old != new:
            raise CacheError(
                f"{folder} holds another cache ({key}: {old!r} there, {new!r} here): name a new folder."
            )
    if found.model_fingerprint != ours.model_fingerprint:
        raise CacheError(
            f"{folder} was begun with a model of the same name {ours.settings['model_name']!r} and other "
            "weights: name a new folder."
        )
    for files in (found.train, found.held_out, found.others):
        for name in [name for name, shard in files.items() if damage(folder, name, shard)]:
            del files[name]
            found.complete = False
    for leftover in folder.glob("*/.data-*"):
        leftover.unlink()
    return found


def _describe_dataset(folder: Path, split: Split, manifest: Manifest) -> None:
    """The files with which `datasets.load_from_disk` knows its own."""
    shards = manifest.shards(split)
    if not shards:
        return
    Dataset.from_file(str(folder / next(iter(shards)))).info.write_to_directory(str(folder / split))
    state: Mapping[str, Any] = {
        "_data_files": [{"filename": Path(name).name} for name in shards],
        "_fingerprint": hashlib.sha256("".join(s.sha256 for s in shards.values()).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_atomically(folder / split / "state.json", json.dumps(state))
