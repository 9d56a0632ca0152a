"""SAELens's stock runner trains our architectures; what cannot work is refused before anything is lost."""

from __future__ import annotations

import functools
import gc
import io
import json
import math
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import (
    SAE,
    HookedSAETransformer,
    JumpReLUSAE,
    JumpReLUTranscoder,
    LanguageModelSAETrainingRunner,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from tqdm import tqdm
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.runner import observe
from tests import tiny_models
from tests.helpers import runner_config, sparse_batches, trainer_for, transcoder_config


def _run(cfg: Any, model: Any, dataset: Any) -> Any:
    return LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()


def test_stock_runner_trains_a_transcoder_that_stock_saelens_loads(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    cfg = runner_config(transcoder_config(), output_path=str(tmp_path / "out"))
    trained = _run(cfg, tiny_model, token_dataset)
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert type(loaded) is JumpReLUTranscoder
    metadata = loaded.cfg.metadata
    assert metadata.hook_name == "blocks.2.ln2.hook_normalized"
    assert metadata.hook_name_out == "blocks.2.hook_mlp_out"
    assert metadata.input_frame == "normalized"
    assert sm.matryoshka_widths(loaded) == [32, 96, 256]
    # what is saved reads the raw hook; what was trained reads the MLP's true input
    tokens = torch.randint(3, 1000, (2, 16))
    _, cache = tiny_model.run_with_cache(tokens)
    raw = cache["blocks.2.ln2.hook_normalized"]
    source = sm.find_site(tiny_model, 2, "mlp_in")(raw)
    torch.testing.assert_close(loaded(raw), trained.eval()(source), rtol=1e-5, atol=2e-5)


def test_stock_runner_trains_an_sae(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=256, k=8, matryoshka_widths=[32, 256])
    cfg = runner_config(sae, hook_name="blocks.1.hook_resid_post", output_path=str(tmp_path / "o"))
    _run(cfg, tiny_model, token_dataset)
    loaded = SAE.load_from_disk(tmp_path / "o")
    assert type(loaded) is JumpReLUSAE
    assert loaded.cfg.metadata.input_frame == "raw"


def test_width_of_an_sae_that_does_not_fit_the_hook_is_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=64, d_sae=256, k=8, matryoshka_widths=[32, 256])
    with pytest.raises(ValueError, match="d_in=64.*'blocks.1.hook_resid_post'.*128"):
        _run(runner_config(sae, hook_name="blocks.1.hook_resid_post"), tiny_model, token_dataset)


MAPPINGS = {
    "mlp_in -> mlp_out": ("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out", {}),
    "resid_mid -> mlp_out": (
        "blocks.2.hook_resid_mid",
        "blocks.2.hook_mlp_out",
        {"input_gain": "none"},
    ),
    "resid_pre -> attn_out": (
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_attn_out",
        {"input_gain": "none"},
    ),
    "resid_pre -> resid_post": (
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_resid_post",
        {"input_gain": "none"},
    ),
    "cross-layer": (
        "blocks.0.hook_resid_post",
        "blocks.3.hook_resid_post",
        {"input_gain": "none"},
    ),
}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("architecture", ["transcoder", "skip"])
def test_every_mapping_trains(
    mapping: str,
    architecture: str,
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    tmp_path: Path,
) -> None:
    hook_name, hook_name_out, change = MAPPINGS[mapping]
    sae: Any = transcoder_config(hook_name_out=hook_name_out, **change)
    if architecture == "skip":
        settings = {name: getattr(sae, name) for name in ("d_in", "d_sae", "k", "input_gain")}
        sae = sm.MatryoshkaTrainingSkipTranscoderConfig(
            **settings, matryoshka_widths=[32, 256], hook_name_out=hook_name_out
        )
    cfg = runner_config(sae, hook_name=hook_name, output_path=str(tmp_path / "out"))
    _run(cfg, tiny_model, token_dataset)
    loaded = SAE.load_from_disk(tmp_path / "out")
    model = HookedSAETransformer(tiny_model.cfg)
    model.load_state_dict(tiny_model.state_dict())
    tokens = torch.randint(3, 1000, (2, 16))
    clean = model(tokens)
    model.add_sae(loaded)
    assert not torch.allclose(model(tokens), clean)


def test_source_and_target_may_differ_in_width(tmp_path: Path) -> None:
    """hook_z has heads, which are flattened."""
    hf = tiny_models.gpt2_hf()
    model = tiny_models.hooked_transformer(hf)
    d_z = model.cfg.n_heads * model.cfg.d_head
    sae = transcoder_config(
        d_in=d_z,
        d_out=model.cfg.d_model,
        d_sae=64,
        k=4,
        matryoshka_widths=[16, 64],
        hook_name_out="blocks.1.hook_resid_post",
        input_gain="none",
    )
    cfg = runner_config(
        sae,
        hook_name="blocks.1.attn.hook_z",
        context_size=8,
        n_batches_in_buffer=32,
        output_path=str(tmp_path / "out"),
    )
    _run(cfg, model, _tokens(n_vocab=40, length=8))
    assert SAE.load_from_disk(tmp_path / "out").W_dec.shape == (64, model.cfg.d_model)


def _tokens(n_vocab: int, length: int, n: int = 200) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": torch.randint(3, n_vocab, (n, length)).tolist()})


def test_same_tensor_twice_is_allowed_with_a_warning(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    sae = transcoder_config(hook_name_out="blocks.2.hook_resid_pre", input_gain="none")
    cfg = runner_config(sae, hook_name="blocks.1.hook_resid_post")
    with pytest.warns(UserWarning, match="are the same tensor"):
        _run(cfg, tiny_model, token_dataset)


def test_auto_model_for_causal_lm_with_a_local_path(token_dataset: datasets.Dataset, tmp_path: Path) -> None:
    """Of an HF model SAELens instruments only the hook it knows; the target's is added."""
    sae = transcoder_config(hook_name_out="model.layers.2.post_feedforward_layernorm", input_gain="none")
    cfg = runner_config(
        sae,
        model_class_name="AutoModelForCausalLM",
        model_name=str(tiny.PATH),
        hook_name="model.layers.2.pre_feedforward_layernorm",
        output_path=str(tmp_path / "out"),
    )
    LanguageModelSAETrainingRunner(cfg, override_dataset=token_dataset).run()
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert loaded.cfg.metadata.hook_name_out == "model.layers.2.post_feedforward_layernorm"


@pytest.mark.parametrize("input_gain", ["none", "norm_weight"])
def test_transformer_bridge_trains_a_transcoder(
    input_gain: str, token_dataset: datasets.Dataset, tiny_model: HookedTransformer
) -> None:
    bridge = tiny.load_bridge()
    hook = "blocks.2.mlp.hook_in" if input_gain == "none" else "blocks.2.ln2.hook_normalized"
    cfg = runner_config(transcoder_config(input_gain=input_gain), hook_name=hook)
    trained = _run(cfg, bridge, token_dataset)
    # both are the MLP's true input, so they train what HookedTransformer trains
    torch.manual_seed(0)
    expected = _run(runner_config(transcoder_config()), tiny_model, token_dataset)
    assert trained.topk_threshold.item() == pytest.approx(expected.topk_threshold.item(), rel=0.2)


def test_prefetching_trains_the_same_way(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfg = runner_config(transcoder_config(), prefetch_llm_batches=2)
    trained = _run(cfg, tiny_model, token_dataset)
    assert torch.isfinite(trained.W_dec).all()


def test_resume_from_checkpoint_continues(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    sae = transcoder_config(normalize_activations="expected_average_only_in")
    shared = {"n_checkpoints": 1, "n_batches_for_norm_estimate": 2}
    cfg = runner_config(sae, checkpoint_path=str(tmp_path / "checkpoints"), **shared)
    _run(cfg, tiny_model, token_dataset)
    (checkpoint,) = Path(cfg.checkpoint_path).iterdir()
    saved = TrainingSAE.load_from_disk(checkpoint)
    assert isinstance(saved, sm.MatryoshkaTrainingTranscoder)
    assert saved.source_scale != 1
    resumed = runner_config(
        transcoder_config(normalize_activations="expected_average_only_in"),
        resume_from_checkpoint=str(checkpoint),
        output_path=str(tmp_path / "out"),
        **shared,
    )
    runner = LanguageModelSAETrainingRunner(
        resumed, override_model=tiny_model, override_dataset=token_dataset
    )
    runner.run()
    assert runner.activations_store.n_dataset_processed > 0
    assert type(SAE.load_from_disk(tmp_path / "out")) is JumpReLUTranscoder


def _pretrained(model: Any, dataset: Any, place: Path, sae: Any, **fields: Any) -> str:
    cfg = runner_config(sae, n_checkpoints=1, checkpoint_path=str(place / "pretrained"), **fields)
    _run(cfg, model, dataset)
    (checkpoint,) = (place / "pretrained").glob("*/*")
    return str(checkpoint)


def test_a_loaded_transcoder_records_the_target_it_is_trained_on(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    """As SAELens records the runner's hook_name, whatever the loaded one has read before."""
    pretrained = _pretrained(tiny_model, token_dataset, tmp_path, transcoder_config())
    target = "blocks.3.hook_mlp_out"
    cfg = runner_config(
        transcoder_config(hook_name_out=target),
        from_pretrained_path=pretrained,
        output_path=str(tmp_path / "out"),
    )
    _run(cfg, tiny_model, token_dataset)
    assert SAE.load_from_disk(tmp_path / "out").cfg.metadata.hook_name_out == target


def test_a_loaded_dictionary_of_other_settings_is_warned_of(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    pretrained = _pretrained(tiny_model, token_dataset, tmp_path, transcoder_config(k=4))
    cfg = runner_config(transcoder_config(k=8), from_pretrained_path=pretrained)
    with pytest.warns(UserWarning, match=r"not with those of this config \(k: 4 there, 8 here\)"):
        assert _run(cfg, tiny_model, token_dataset).cfg.k == 4
    cfg.sae.k = 4
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not with those of this config")
        _run(cfg, tiny_model, token_dataset)


@pytest.mark.parametrize(("loaded", "here"), [("norm_weight", "none"), ("none", "norm_weight")])
def test_a_loaded_transcoder_of_another_gain_is_refused(
    loaded: str, here: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    pretrained = _pretrained(tiny_model, token_dataset, tmp_path, transcoder_config(input_gain=loaded))
    cfg = runner_config(
        transcoder_config(input_gain=here), from_pretrained_path=pretrained, output_path=str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match=f"input_gain='{here}'.*Set input_gain='{loaded}'"):
        _run(cfg, tiny_model, token_dataset)
    assert not (tmp_path / "out").exists()


def test_a_loaded_sae_is_refused_where_a_transcoder_is_to_be_trained(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    pretrained = _pretrained(tiny_model, token_dataset, tmp_path, sae)
    cfg = runner_config(transcoder_config(), from_pretrained_path=pretrained)
    with pytest.raises(
        ValueError, match="from_pretrained_path.*holds a 'matryoshka_sae'.*'matryoshka_transcoder'"
    ):
        _run(cfg, tiny_model, token_dataset)
    given = TrainingSAE.load_from_disk(pretrained)
    runner = LanguageModelSAETrainingRunner(
        runner_config(transcoder_config()),
        override_model=tiny_model,
        override_dataset=token_dataset,
        override_sae=given,
    )
    with pytest.raises(ValueError, match="override_sae: the dictionary is a 'matryoshka_sae'.*a transcoder"):
        runner.run()


@pytest.mark.parametrize("architecture", ["sae", "transcoder"])
def test_a_saved_model_is_refused_where_a_checkpoint_is_to_be_trained_on(
    architecture: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    """SAELens would train a saved SAE as a JumpReLU SAE without levels, and knows no saved transcoder."""
    sae: Any = transcoder_config()
    if architecture == "sae":
        sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    saved = str(tmp_path / "saved")
    _run(runner_config(sae, output_path=saved), tiny_model, token_dataset)
    with pytest.raises(ValueError, match=f"from_pretrained_path={saved!r} holds a 'jumprelu.*a checkpoint"):
        _run(runner_config(sae, from_pretrained_path=saved), tiny_model, token_dataset)


def test_a_pretrained_path_without_a_dictionary_is_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    cfg = runner_config(transcoder_config(), from_pretrained_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"from_pretrained_path=.* holds no dictionary: .* cfg\.json"):
        _run(cfg, tiny_model, token_dataset)


def test_stock_architectures_are_left_alone(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfg = runner_config(StandardTrainingSAEConfig(d_in=128, d_sae=64), hook_name="blocks.1.hook_resid_post")
    _run(cfg, tiny_model, token_dataset)


def test_progress_bar_shows_what_matters_first(
    tiny_model: HookedTransformer,
    token_dataset: datasets.Dataset,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # as wide as it likes
    _run(runner_config(transcoder_config()), tiny_model, token_dataset)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"1\.02k/1\.02k .* FVU \d\.\d{3} L0 8\.0 dead \d+% loss \d", last), last


# ---- what cannot work


BAD = {
    "hook_name": (
        {"hook_name": "blocks.2.ln2.hook_normalised"},
        {},
        ["hook_name='blocks.2.ln2.hook_normalised'", "blocks.2.ln2.hook_normalized"],
    ),
    "hook_name_out": (
        {},
        {"hook_name_out": "blocks.2.hook_mlp_ot"},
        ["hook_name_out='blocks.2.hook_mlp_ot'", "blocks.2.hook_mlp_out"],
    ),
    "layer that does not exist": (
        {"hook_name": "blocks.9.hook_resid_mid"},
        {"input_gain": "none"},
        ["hook_name='blocks.9.hook_resid_mid'"],
    ),
    "target before source in the block": (
        {"hook_name": "blocks.2.hook_mlp_out"},
        {"hook_name_out": "blocks.2.hook_resid_mid", "input_gain": "none"},
        ["hook_name_out='blocks.2.hook_resid_mid'", "computed before"],
    ),
    "target in an earlier layer": (
        {"hook_name": "blocks.2.hook_resid_pre"},
        {"hook_name_out": "blocks.1.hook_resid_pre", "input_gain": "none"},
        ["computed before"],
    ),
    "d_in": ({}, {"d_in": 64}, ["d_in=64", "128"]),
    "d_out": ({}, {"d_out": 64}, ["d_out=64", "128"]),
    "no norm at the hook": (
        {"hook_name": "blocks.2.hook_resid_mid"},
        {},
        ["input_gain='norm_weight'", "blocks.2.hook_resid_mid"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_config_that_does_not_fit_the_model_is_refused(
    case: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    runner_change, sae_change, says = BAD[case]
    cfg = runner_config(transcoder_config(**sae_change), output_path=str(tmp_path / "out"), **runner_change)
    with pytest.raises(ValueError) as error:
        _run(cfg, tiny_model, token_dataset)
    for part in says:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_gain_of_a_folded_norm_is_refused(token_dataset: datasets.Dataset) -> None:
    folded = tiny.load_hooked_transformer(fold_ln=True)
    with pytest.raises(ValueError, match="input_gain='norm_weight'.*folded"):
        _run(runner_config(transcoder_config()), folded, token_dataset)


def test_frame_of_a_folded_norm_is_recorded_and_a_mismatch_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    folded = tiny.load_hooked_transformer(fold_ln=True)
    trained = _run(runner_config(transcoder_config(input_gain="none")), folded, token_dataset)
    assert trained.cfg.metadata.input_frame == "normalized_folded"
    with pytest.raises(ValueError, match="input_frame"):
        sm.evaluate(trained, tiny_model, token_dataset, n_tokens=100)


@pytest.mark.parametrize("size", [-5, math.inf, math.nan, "1M"])
def test_a_run_of_no_tokens_or_without_end_is_refused(
    size: Any, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfg = runner_config(transcoder_config())
    cfg.training_tokens = size
    with pytest.raises(ValueError, match=f"training_tokens={size!r} must be a number larger than 0"):
        _run(cfg, tiny_model, token_dataset)


@pytest.mark.parametrize("size", [-5, 0, math.inf, 128.0, "128"])
@pytest.mark.parametrize("field", ["train_batch_size_tokens", "store_batch_size_prompts"])
def test_batches_of_no_whole_number_are_refused(
    field: str, size: Any, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfg = runner_config(transcoder_config())
    setattr(cfg, field, size)
    with pytest.raises(ValueError, match=f"{field}={size!r} must be a positive integer"):
        _run(cfg, tiny_model, token_dataset)


@pytest.mark.parametrize("architecture", ["sae", "transcoder"])
def test_prompts_longer_than_the_language_model_takes_are_refused(
    architecture: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    sae: Any = transcoder_config()
    if architecture == "sae":
        sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    cfg = runner_config(sae, context_size=512)
    with pytest.raises(ValueError, match="context_size=512 must be from 2 to 256, the longest"):
        _run(cfg, tiny_model, token_dataset)


@pytest.mark.parametrize("architecture", ["sae", "transcoder"])
def test_empty_dataset_is_refused(architecture: str, tiny_model: HookedTransformer) -> None:
    sae: Any = transcoder_config()
    if architecture == "sae":
        sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    empty = datasets.Dataset.from_dict({"input_ids": []})
    with pytest.raises(ValueError, match="dataset_path='tokens': the dataset is empty"):
        _run(runner_config(sae), tiny_model, empty)


def test_a_list_of_rows_trains_as_the_dataset_of_them(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    trained = []
    for dataset in (token_dataset, token_dataset.to_list()):
        torch.manual_seed(0)
        trained.append(_run(runner_config(sae), tiny_model, dataset))
    assert torch.equal(trained[0].W_dec, trained[1].W_dec)


def test_a_dataset_that_cannot_be_read_twice_is_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    with pytest.raises(ValueError, match="override_dataset is a list_iterator, and must be a dataset"):
        _run(runner_config(transcoder_config()), tiny_model, iter(token_dataset.to_list()))


@pytest.mark.parametrize("architecture", ["sae", "transcoder"])
def test_too_small_dataset_is_refused(architecture: str, tiny_model: HookedTransformer) -> None:
    sae: Any = transcoder_config()
    if architecture == "sae":
        sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
    with pytest.raises(ValueError, match="too small.*gives 3 sequences.*store_batch_size_prompts=4"):
        _run(runner_config(sae), tiny_model, _tokens(1000, 32, n=3))


def test_checking_the_dataset_leaves_its_position_alone(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfg = runner_config(transcoder_config(), n_eval_batches=0)
    store = LanguageModelSAETrainingRunner(
        cfg, override_model=tiny_model, override_dataset=token_dataset
    ).activations_store
    assert store.n_dataset_processed == 0
    first = torch.tensor(token_dataset[0]["input_ids"])
    assert torch.equal(store.get_batch_tokens(1)[0].cpu(), first)


def test_dataset_that_cannot_be_loaded_is_never_replaced_by_another(
    tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    missing = str(tmp_path / "no-such-dataset")
    cfg = runner_config(transcoder_config(), dataset_path=missing)
    with pytest.raises(Exception, match="no-such-dataset"):
        LanguageModelSAETrainingRunner(cfg, override_model=tiny_model)


def test_output_path_of_another_run_is_refused_and_left_alone(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _run(runner_config(transcoder_config(), output_path=str(out)), tiny_model, token_dataset)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = runner_config(transcoder_config(k=4), output_path=str(out))
    with pytest.raises(ValueError, match="output_path=.*another run.*sae.k: 8 there, 4 here"):
        _run(other, tiny_model, token_dataset)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # the same settings again may overwrite their own result
    _run(runner_config(transcoder_config(), output_path=str(out)), tiny_model, token_dataset)


@pytest.mark.parametrize("content", ["file", "weights alone", "broken settings", "settings of no run"])
def test_output_path_that_would_lose_something_is_refused(
    content: str, tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "sae_weights.safetensors").write_text("mine")
    if content == "broken settings":
        (out / "runner_cfg.json").write_text('{"sae": ')
    elif content == "settings of no run":
        (out / "runner_cfg.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="output_path="):
        _run(runner_config(transcoder_config(), output_path=str(out)), tiny_model, token_dataset)
    assert (out if content == "file" else out / "sae_weights.safetensors").read_text() == "mine"


def test_nan_in_the_model_stops_with_the_last_checkpoint_intact(
    token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    model = tiny.load_hooked_transformer()
    n_calls = 0

    def break_later(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        nonlocal n_calls
        n_calls += 1
        return activation * float("nan") if n_calls > 9 else activation

    model.add_hook("blocks.2.hook_mlp_out", break_later, is_permanent=True)
    cfg = runner_config(
        transcoder_config(),
        training_tokens=128 * 40,
        n_checkpoints=8,
        n_batches_in_buffer=4,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "out"),
    )
    with pytest.raises(sm.NonFiniteActivationsError, match="target.*blocks.2.hook_mlp_out"):
        _run(cfg, model, token_dataset)
    checkpoints = sorted(Path(cfg.checkpoint_path).iterdir(), key=lambda path: int(path.name))
    weights = TrainingSAE.load_from_disk(checkpoints[-1]).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    json.loads((checkpoints[-1] / "runner_cfg.json").read_text())
    assert not (tmp_path / "out").exists()


def test_training_is_quiet(tiny_model: HookedTransformer, token_dataset: datasets.Dataset) -> None:
    """None of the warnings come from this package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _run(runner_config(transcoder_config()), tiny_model, token_dataset)
    assert not [w for w in caught if "saelens_matryoshka" in w.filename]


def test_the_bar_fits_a_terminal_and_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=32, k=2, matryoshka_widths=[8, 32])
    )
    written = io.StringIO()
    # Of 80 columns, 10 are for what a long run has more of: hours, and larger numbers of tokens.
    monkeypatch.setattr("sae_lens.training.sae_trainer.tqdm", functools.partial(tqdm, file=written, ncols=70))
    trainer_for(sae, sparse_batches(3, 16, 16), total_training_samples=40).fit()  # the last batch ends at 48
    last = written.getvalue().rstrip().split("\r")[-1]
    assert re.fullmatch(r"100%\|[█#]+\| 40.0/40.0 \[.*tok/s, FVU \d\.\d{3} L0 2\.0 dead \d+%\]", last)


def test_it_trains_with_the_bar_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=32, k=2, matryoshka_widths=[8, 32])
    )
    monkeypatch.setattr("sae_lens.training.sae_trainer.tqdm", functools.partial(tqdm, disable=True))
    trainer = trainer_for(sae, sparse_batches(3, 16, 16), total_training_samples=48)
    trainer.fit()
    assert trainer.n_training_steps == 3


def test_a_trainer_is_freed_though_its_observers_refer_to_it() -> None:
    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=32, k=2, matryoshka_widths=[8, 32])
    )
    trainer = trainer_for(sae, sparse_batches(2, 16, 16))
    seen: list[Any] = []
    observe(trainer, lambda done, _, own=trainer: seen.append(done is own))
    trainer.fit()
    assert seen == [True, True]
    freed = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert freed() is None
