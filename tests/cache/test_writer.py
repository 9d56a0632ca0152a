"""A cache holds what the model gives, survives being killed, and is never mixed with another."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka.cache import CacheError, Manifest, open_cache, verify_cache, write_cache
from saelens_matryoshka.cache.manifest import sampled_hash
from tests.cache.helpers import SOURCE, TARGET, settings


def _assert_same_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In any order. Sorting them would not do: rounding, which differs between batches, decides between
    rows whose first values are all but equal."""
    distances = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found[distances.argmin(dim=0)], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected[distances.argmin(dim=1)], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean(dim=0), expected.mean(dim=0), rtol=1e-5, atol=1e-5)


def _columns(folder: Path, split: str) -> dict[str, torch.Tensor]:
    data = datasets.load_from_disk(str(folder))[split].with_format("torch")
    return {name: data[name][:] for name in data.column_names}


def test_the_rows_are_what_the_model_gives_on_the_prompts(
    cache_folder: Path, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    for split, prompts in (("held_out", slice(0, 8)), ("train", slice(8, 8 + 64))):
        found = _columns(cache_folder, split)
        tokens = torch.as_tensor(token_dataset["input_ids"][prompts])
        _, seen = tiny_model.run_with_cache(tokens, names_filter=[SOURCE, TARGET])
        for hook in (SOURCE, TARGET):
            _assert_same_rows(found[hook], seen[hook].flatten(0, 1))
        assert found["token"].sort().values.tolist() == tokens.flatten().sort().values.tolist()


def test_source_and_target_of_a_token_stay_together(
    cache_folder: Path, tiny_model: HookedTransformer
) -> None:
    """The MLP of the model makes the target's row from the source's."""
    found = _columns(cache_folder, "train")
    block = tiny_model.blocks[2]
    out = block.mlp(found[SOURCE][None] * block.ln2.w)
    torch.testing.assert_close(block.ln2_post(out)[0], found[TARGET], rtol=1e-4, atol=1e-4)


def test_special_tokens_are_left_out(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    cfg = settings(exclude_special_tokens=True, training_tokens=256, held_out_tokens=0)
    manifest = write_cache(tmp_path / "c", tiny_model, cfg, token_dataset, progress=False)
    assert manifest.rows("train") == 256 - 8  # each prompt of the data begins with token 0
    assert 0 not in _columns(tmp_path / "c", "train")["token"]


def test_hooks_are_listed_in_the_order_the_model_computes_them(cache_folder: Path) -> None:
    manifest = Manifest.load(cache_folder)
    assert list(manifest.hooks) == [SOURCE, TARGET]
    assert [hook.frame for hook in manifest.hooks.values()] == ["normalized", "raw"]
    assert len(manifest.train) == 4
    assert manifest.complete


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("point", range(1, 12))
def test_a_cache_whose_writing_was_killed_is_finished_as_if_it_had_not(
    point: int,
    cache_folder: Path,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files get their names by `os.replace`: of a shard, then of the manifest. Stop before the n-th."""
    calls, replace = [0], os.replace

    def killed(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == point:
            raise _Killed
        replace(*args)

    folder = tmp_path / "c"
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(_Killed):
        write_cache(folder, tiny_model, settings(), token_dataset, progress=False)
    monkeypatch.undo()
    if (folder / "manifest.json").exists():
        with pytest.raises(CacheError, match="not complete"):
            open_cache(folder)
    write_cache(folder, tiny_model, settings(), token_dataset, progress=False)
    finished, straight = verify_cache(folder), Manifest.load(cache_folder)
    assert finished.complete
    assert (finished.train, finished.held_out) == (straight.train, straight.held_out)
    assert not list(folder.rglob(".data-*"))


def test_a_complete_cache_is_not_written_again(
    cache_folder: Path, token_dataset: datasets.Dataset, tiny_model: HookedTransformer
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache_folder.rglob("*.arrow")}
    write_cache(cache_folder, tiny_model, settings(), token_dataset, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in cache_folder.rglob("*.arrow")}


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 255]))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (_truncate, "cut short"),
        (lambda path: _flip(path, 5), "checksum"),
    ],
    ids=["missing", "truncated", "changed"],
)
@pytest.mark.parametrize("name", ["train/data-00001.arrow", "gains.safetensors"])
def test_a_damaged_file_is_seen_when_the_cache_is_opened_and_made_again(
    harm: Any,
    message: str,
    name: str,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    tmp_path: Path,
) -> None:
    small = settings(training_tokens=1024, held_out_tokens=0)
    folder = tmp_path / "c"
    before = write_cache(folder, tiny_model, small, token_dataset, progress=False)
    harm(folder / name)
    with pytest.raises(CacheError, match=f"{name}.*{message}"):
        open_cache(folder)
    write_cache(folder, tiny_model, small, token_dataset, progress=False)
    after = verify_cache(folder)
    assert (after.train, after.others) == (before.train, before.others)


def test_damage_between_the_samples_is_seen_by_a_full_check(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    write_cache(folder, tiny_model, settings(held_out_tokens=0, shard_bytes=1 << 30), token_dataset)
    path = folder / "train" / "data-00000.arrow"
    sample = sampled_hash(path)
    place = next(p for p in range(0, path.stat().st_size, 997) if not _is_sampled(path, p))
    _flip(path, place)
    assert sampled_hash(path) == sample
    open_cache(folder)
    with pytest.raises(CacheError, match=r"data-00000.arrow has another checksum.*Delete it"):
        verify_cache(folder)


def _is_sampled(path: Path, position: int) -> bool:
    before = sampled_hash(path)
    _flip(path, position)
    seen = sampled_hash(path) != before
    _flip(path, position)
    return seen


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8"},
        {"hook_names": (SOURCE,)},
        {"context_size": 16},
        {"training_tokens": 4096},
        {"seed": 1},
    ],
)
def test_another_cache_is_not_mixed_into_a_folder(
    change: dict[str, Any], cache_folder: Path, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    with pytest.raises(CacheError, match=f"another cache.*{next(iter(change))}"):
        write_cache(cache_folder, tiny_model, settings(**change), token_dataset)


def test_a_model_with_other_weights_does_not_continue_a_cache(
    cache_folder: Path, token_dataset: datasets.Dataset
) -> None:
    from saelens_matryoshka import tiny

    model = tiny.load_hooked_transformer(fold_ln=True)
    with pytest.raises(CacheError, match=r"begun with a model of the same name.*other.*weights"):
        write_cache(cache_folder, model, settings(), token_dataset)


def test_a_folder_with_something_else_in_it_is_left_alone(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(CacheError, match="holds something else"):
        write_cache(tmp_path, tiny_model, settings(), token_dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_hook_that_does_not_exist_is_refused_before_anything_is_written(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="hook_names='blocks.2.hook_mlp_oot'.*did you mean"):
        write_cache(
            tmp_path / "c", tiny_model, settings(hook_names=("blocks.2.hook_mlp_oot",)), token_dataset
        )
    assert not (tmp_path / "c").exists()


def test_prompts_longer_than_the_language_model_takes_are_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="context_size=512 must be from 2 to 256, the longest"):
        write_cache(tmp_path / "c", tiny_model, settings(context_size=512), token_dataset)
    assert not (tmp_path / "c").exists()


def test_a_list_of_rows_is_written_as_the_dataset_of_them(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    shards = [
        write_cache(tmp_path / name, tiny_model, settings(), dataset, progress=False).train
        for name, dataset in (("dataset", token_dataset), ("list", token_dataset.to_list()))
    ]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("several", [False, True])
def test_what_is_no_dataset_is_refused_before_anything_is_written(
    several: bool, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    text: Any = datasets.DatasetDict(train=token_dataset) if several else (row for row in token_dataset)
    says = "dataset has the splits train" if several else "dataset is a generator, and must be a dataset"
    with pytest.raises(ValueError, match=says):
        write_cache(tmp_path / "c", tiny_model, settings(), text)
    assert not (tmp_path / "c").exists()


def test_a_text_that_ends_early_gives_what_it_has(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    short = token_dataset.select(range(12))
    manifest = write_cache(tmp_path / "c", tiny_model, settings(training_tokens=10**6), short, progress=False)
    assert manifest.complete
    assert (manifest.rows("held_out"), manifest.rows("train")) == (8 * 32, 4 * 32)


def test_a_manifest_that_is_not_one_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", json.dumps({"format": "something else"})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CacheError, match="manifest"):
            open_cache(tmp_path)
