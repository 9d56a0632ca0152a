"""SAELens's runner trains from a cache, without a language model, on what it would have trained on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.cache import CachedModel, CacheError, open_cache, write_cache
from saelens_matryoshka.cache.store import cached_store, evaluate_cached
from saelens_matryoshka.evaluation.training_evaluator import CachedEvaluator
from tests.cache.helpers import SOURCE, TARGET, settings
from tests.helpers import runner_config, transcoder_config


def _config(folder: Path, sae: Any = None, **overrides: Any) -> Any:
    cache = {"use_cached_activations": True, "cached_activations_path": str(folder)}
    return runner_config(transcoder_config() if sae is None else sae, **{**cache, **overrides})


def _run(cfg: Any, folder: Path) -> Any:
    runner = LanguageModelSAETrainingRunner(cfg, override_model=CachedModel(open_cache(folder)))
    return runner.run()


def test_a_transcoder_trains_from_a_cache_and_reads_the_raw_hook(
    cache_folder: Path, tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    trained = _run(_config(cache_folder, output_path=str(tmp_path / "out")), cache_folder)
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert loaded.cfg.metadata.input_frame == "normalized"
    assert loaded.cfg.metadata.hook_name_out == TARGET
    raw = torch.randn(5, 128)
    source = sm.find_site(tiny_model, 2, "mlp_in")(raw)
    torch.testing.assert_close(loaded(raw), trained.eval()(source), rtol=1e-5, atol=2e-5)


def test_an_sae_trains_from_a_cache_of_several_hooks(cache_folder: Path, tmp_path: Path) -> None:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=256, k=8, matryoshka_widths=[32, 256])
    _run(_config(cache_folder, sae, hook_name=TARGET, output_path=str(tmp_path / "out")), cache_folder)
    assert SAE.load_from_disk(tmp_path / "out").cfg.metadata.input_frame == "raw"


def test_batches_are_source_with_its_gain_and_target(
    cache_folder: Path, tiny_model: HookedTransformer
) -> None:
    cfg = _config(cache_folder)
    store = cached_store(cfg, CachedModel(open_cache(cache_folder)))
    source, target = next(store).split([128, 128], dim=1)
    cache = open_cache(cache_folder)
    rows = next(cache.batches([SOURCE, TARGET], 128, seed=cfg.seed, dtype=torch.float32))
    torch.testing.assert_close(source, rows[SOURCE] * tiny_model.blocks[2].ln2.w)
    assert torch.equal(target, rows[TARGET])


def test_a_run_with_the_same_seed_is_the_same(cache_folder: Path) -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        weights.append(_run(_config(cache_folder), cache_folder).W_dec.detach().clone())
    assert torch.equal(*weights)


def test_batches_that_a_prefetcher_holds_are_not_counted_as_trained_on(
    cache_folder: Path, tmp_path: Path
) -> None:
    stores = [cached_store(_config(cache_folder), CachedModel(open_cache(cache_folder))) for _ in range(2)]
    stores[0].expect_prefetching(2)
    first, second, third = (next(stores[0]) for _ in range(3))
    assert stores[0].is_next(first)
    stores[0].save_to_checkpoint(tmp_path)
    stores[1].load_from_checkpoint(tmp_path)
    assert torch.equal(next(stores[1]), second)
    assert torch.equal(next(stores[1]), third)


def test_a_store_is_continued_from_its_checkpoint(cache_folder: Path, tmp_path: Path) -> None:
    stores = [cached_store(_config(cache_folder), CachedModel(open_cache(cache_folder))) for _ in range(2)]
    for _ in range(3):
        next(stores[0])
    stores[0].save_to_checkpoint(tmp_path)
    stores[1].load_from_checkpoint(tmp_path)
    assert torch.equal(next(stores[0]), next(stores[1]))


def test_a_run_does_not_go_on_with_another_cache(
    cache_folder: Path, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    """Its place would be one among other rows, or among the same in another order."""
    other = tmp_path / "other"
    write_cache(other, tiny_model, settings(seed=43), token_dataset, progress=False)
    stores = [cached_store(_config(one), CachedModel(open_cache(one))) for one in (cache_folder, other)]
    next(stores[0])
    stores[0].save_to_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="other is not the one this run was started with"):
        stores[1].load_from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "gpt2"}, "model_name='gpt2', but the cache .* was made with model_name='tiny'"),
        ({"hook_name": "blocks.1.ln2.hook_normalized"}, "hook_name='blocks.1.ln2.hook_normalized' is not in"),
        ({"context_size": 64}, "context_size=64, but the cache .* context_size=32"),
        ({"exclude_special_tokens": True}, "exclude_special_tokens=True"),
        ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "model_from_pretrained_kwargs"),
        ({"autocast_lm": True}, "autocast_lm=True"),
        ({"dataset_path": "other"}, "dataset_path='other'"),
        ({"hook_head_index": 1}, "hook_head_index=1"),
        ({"sae": {"d_in": 64}}, "d_in=64, but hook .* has 128 values"),
        ({"sae": {"d_out": 64}}, "d_out=64, but hook .* has 128 values"),
        (
            {"sae": {"hook_name_out": "blocks.3.hook_mlp_out"}},
            "hook_name_out='blocks.3.hook_mlp_out' is not in",
        ),
        ({"hook_name": TARGET, "sae": {"hook_name_out": SOURCE, "input_gain": "none"}}, "is computed before"),
        ({"hook_name": TARGET, "sae": {"hook_name_out": TARGET}}, "input_gain='norm_weight' needs"),
    ],
    ids=str,
)
def test_a_cache_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, cache_folder: Path
) -> None:
    change = dict(change)
    sae = transcoder_config(**change.pop("sae", {}))
    with pytest.raises(CacheError, match=message):
        _run(_config(cache_folder, sae, **change), cache_folder)


def test_a_folded_model_is_another_frame(token_dataset: datasets.Dataset, tmp_path: Path) -> None:
    from saelens_matryoshka import tiny

    model = tiny.load_hooked_transformer(fold_ln=True)
    small = settings(training_tokens=256, held_out_tokens=0)
    write_cache(tmp_path / "c", model, small, token_dataset, progress=False)
    with pytest.raises(CacheError, match="'normalized_folded'"):
        _run(_config(tmp_path / "c"), tmp_path / "c")
    sae = transcoder_config(input_gain="none")
    trained = _run(_config(tmp_path / "c", sae, training_tokens=256), tmp_path / "c")
    assert trained.cfg.metadata.input_frame == "normalized_folded"


def test_held_out_rows_give_the_numbers_of_an_evaluation_on_their_tokens(
    cache_folder: Path, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    _run(_config(cache_folder, output_path=str(tmp_path / "out")), cache_folder)
    sae = SAE.load_from_disk(tmp_path / "out")
    tokens = torch.as_tensor(token_dataset["input_ids"][:8])
    live = sm.evaluate(sae, tiny_model, tokens, n_tokens=256, n_ce_tokens=0, exclude_special_tokens=False)
    cached = evaluate_cached(sae, open_cache(cache_folder))
    assert cached.n_tokens == live.n_tokens == 256
    for ours, theirs in zip(cached.prefixes, live.prefixes, strict=True):
        assert ours.fvu == pytest.approx(theirs.fvu, rel=1e-4)
        assert (ours.l0, ours.n_dead) == pytest.approx((theirs.l0, theirs.n_dead), rel=1e-2)
        assert ours.ce is None


def test_the_trainer_evaluates_on_held_out_rows_and_changes_nothing(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = _run(_config(cache_folder), cache_folder)
    store = cached_store(_config(cache_folder), CachedModel(open_cache(cache_folder)))
    before, position = sae.topk_threshold.clone(), store.batches.position
    monkeypatch.delattr("saelens_matryoshka.evaluation.evaluator.decoder_redundancy")  # it is not logged
    evaluator = CachedEvaluator(functools.partial(evaluate_cached, cache=store.cache))
    logged = evaluator(sae, store, ActivationScaler())
    assert 0 < logged["held_out/fvu_w256"] < 2
    assert "held_out/kl_w256" not in logged
    assert torch.equal(sae.topk_threshold, before)
    assert store.batches.position == position


def test_the_language_model_is_not_there(cache_folder: Path) -> None:
    model = CachedModel(open_cache(cache_folder))
    with pytest.raises(RuntimeError, match="there is no language model"):
        model.run_with_cache(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compressed_caches_train(
    dtype: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    small = settings(dtype=dtype, training_tokens=512, held_out_tokens=128)
    manifest = write_cache(tmp_path / "c", tiny_model, small, token_dataset, progress=False)
    assert manifest.bytes < 640 * (4 + 2 * 128 * 4)
    _run(_config(tmp_path / "c", training_tokens=512), tmp_path / "c")


def test_a_transcoder_of_one_tensor_under_two_names_is_told(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    one, other = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
    write_cache(
        tmp_path / "cache", tiny_model, settings(hook_names=(one, other)), token_dataset, progress=False
    )
    cfg = _config(
        tmp_path / "cache", transcoder_config(hook_name_out=other, input_gain="none"), hook_name=one
    )
    with pytest.warns(UserWarning, match="are the same tensor"):
        cached_store(cfg, CachedModel(open_cache(tmp_path / "cache")))
