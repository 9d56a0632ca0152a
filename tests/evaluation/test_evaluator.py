from __future__ import annotations

import dataclasses
import json
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.evaluation.evaluator import evaluate_activations
from tests import tiny_models

SOURCE, TARGET = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
WIDTHS = [16, 64]


def _stock_transcoder(skip: bool = False, **metadata: Any) -> Any:
    settings: dict[str, Any] = {
        "d_in": 128,
        "d_out": 128,
        "d_sae": 64,
        "apply_b_dec_to_input": False,
        "metadata": SAEMetadata(
            **{
                "hook_name": SOURCE,
                "hook_name_out": TARGET,
                "matryoshka_widths": WIDTHS,
                "context_size": 32,
                "prepend_bos": True,
            }
            | metadata
        ),
    }
    torch.manual_seed(0)
    if skip:
        model: Any = JumpReLUSkipTranscoder(JumpReLUSkipTranscoderConfig(**settings))
        model.W_skip.data.normal_(std=0.01)
    else:
        model = JumpReLUTranscoder(JumpReLUTranscoderConfig(**settings))
    model.b_dec.data.normal_()
    model.threshold.data.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def tokens(token_dataset: datasets.Dataset) -> torch.Tensor:
    return torch.tensor(token_dataset[:24]["input_ids"])


@pytest.mark.parametrize("skip", [False, True])
def test_metrics_equal_a_direct_computation(
    skip: bool, tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    transcoder = _stock_transcoder(skip)
    result = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=tokens.numel(), n_ce_tokens=tokens.numel())
    special = torch.tensor([0, 1, 2])
    keep = ~torch.isin(tokens, special)
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens)
        x, y = cache[SOURCE], cache[TARGET]
    assert result.n_tokens == int(keep.sum())
    counted = keep[:, :-1] & keep[:, 1:]
    assert result.n_ce_tokens == int(counted.sum())

    def ce(replacement: torch.Tensor | None) -> float:
        def replace(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            if replacement is None:
                return activation
            return torch.where(keep[..., None], replacement, activation)

        with torch.no_grad():
            logits = tiny_model.run_with_hooks(tokens, fwd_hooks=[(TARGET, replace)])
        return F.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted]).item()

    variance = (y[keep] - y[keep].mean(dim=0)).double().pow(2).sum()
    zero, untouched = ce(torch.zeros_like(y)), ce(None)
    mean = ce(y[keep].mean(dim=0).expand_as(y))
    assert result.ce_clean == pytest.approx(untouched, rel=1e-4)
    assert result.ce_zero == pytest.approx(zero, rel=1e-4)
    assert result.ce_mean == pytest.approx(mean, rel=1e-4)
    for row, width in zip(result.prefixes, WIDTHS, strict=True):
        with torch.no_grad():
            prefix = sm.truncate(transcoder, width)
            output, acts = prefix(x), prefix.encode(x[keep])
        fvu = (output[keep] - y[keep]).double().pow(2).sum() / variance
        cosine = F.cosine_similarity(output[keep], y[keep], dim=-1).mean()
        assert row.width == width
        assert row.cosine == pytest.approx(cosine.item(), rel=1e-4)
        assert row.explained_variance == pytest.approx(1 - row.fvu, rel=1e-4)
        assert sum(row.density) == width - row.n_dead
        assert row.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert row.l0 == pytest.approx((acts > 0).sum(-1).float().mean().item(), rel=1e-4)
        assert row.n_dead == int((acts > 0).sum(0).eq(0).sum())
        assert row.ce == pytest.approx(ce(output), rel=1e-4)
        recovered = (zero - ce(output)) / (zero - untouched)
        assert row.ce_recovered == pytest.approx(recovered, rel=1e-2)


@pytest.mark.parametrize("slice_", [(5, 6), (5, 9), (28, 31)])
def test_next_token_metrics_are_of_the_positions_that_are_replaced(
    slice_: tuple[int, int], tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    transcoder = _stock_transcoder(seqpos_slice=slice_)
    n = tokens.numel()
    result = sm.evaluate(
        transcoder, tiny_model, tokens, n_tokens=n, n_ce_tokens=n, exclude_special_tokens=False
    )
    assert result.n_ce_tokens == result.n_tokens == len(tokens) * (slice_[1] - slice_[0])
    assert result.ce_clean != result.ce_zero
    assert all(row.kl is not None and row.kl > 0.001 for row in result.prefixes)


def test_evaluating_changes_neither_model_nor_sae_nor_random_state(
    tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    transcoder = _stock_transcoder()
    before = {name: tensor.clone() for name, tensor in transcoder.state_dict().items()}
    logits, state = tiny_model(tokens), torch.get_rng_state()
    first = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=500, n_ce_tokens=200)
    second = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=500, n_ce_tokens=200)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny_model(tokens), logits)
    for name, tensor in transcoder.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_sae_is_evaluated_against_what_it_reads(
    tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[16, 64])
    )
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    result = sm.evaluate(sae, tiny_model, tokens, n_tokens=300, n_ce_tokens=100)
    assert result.hook_name_out == "blocks.1.hook_resid_post"
    assert [row.width for row in result.prefixes] == [16, 64]


def test_the_target_is_not_rounded_to_the_dtype_of_the_sae(
    tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    transcoder = _stock_transcoder()
    transcoder.W_dec.data.zero_()
    transcoder.b_dec.data.fill_(0.5)  # predicts what every dtype has
    expected = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=320, n_ce_tokens=0)
    found = sm.evaluate(transcoder.to(torch.bfloat16), tiny_model, tokens, n_tokens=320, n_ce_tokens=0)
    assert found.prefixes[-1].fvu == expected.prefixes[-1].fvu


def test_a_list_of_texts_or_rows_is_read_as_the_dataset_of_them(tiny_model: HookedTransformer) -> None:
    texts = tiny.text.dataset("held_out")["text"][:3]
    rows = [{"text": text} for text in texts]
    results = [
        sm.evaluate(_stock_transcoder(), tiny_model, given, n_tokens=128, n_ce_tokens=0)
        for given in (datasets.Dataset.from_list(rows), rows, list(texts))
    ]
    assert results[0] == results[1] == results[2]


def test_what_is_held_at_a_time_does_not_change_the_metrics(
    tiny_model: HookedTransformer, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoder = _stock_transcoder(skip=True)
    whole = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=500, n_ce_tokens=300)
    monkeypatch.setattr("saelens_matryoshka.evaluation.evaluator._ACTIVATION_VALUES", 64 * 7)
    monkeypatch.setattr("saelens_matryoshka.evaluation.evaluator._LOGIT_VALUES", 1)
    parts = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=500, n_ce_tokens=300, batch_size_prompts=5)
    assert (parts.n_tokens, parts.n_ce_tokens) == (whole.n_tokens, whole.n_ce_tokens)
    for row, other in zip(whole.prefixes, parts.prefixes, strict=True):
        assert (other.l0, other.n_dead) == (row.l0, row.n_dead)
        for name in ("fvu", "cosine", "ce", "kl"):
            assert getattr(other, name) == pytest.approx(getattr(row, name), rel=1e-4)


@pytest.mark.parametrize(
    "architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"]
)
def test_every_stock_architecture_is_evaluated(
    architecture: str, tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    extra: dict[str, Any] = {"k": 8} if "topk" in architecture else {}
    if architecture == "matryoshka_batchtopk":
        extra["matryoshka_widths"] = [16, 64]
    sae = sae_class(cfg_class(d_in=128, d_sae=64, **extra))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    result = sm.evaluate(sae, tiny_model, tokens, n_tokens=300, n_ce_tokens=100)
    assert [row.width for row in result.prefixes] == extra.get("matryoshka_widths", [64])
    _, cache = tiny_model.run_with_cache(tokens[:10])
    x = cache["blocks.1.hook_resid_post"][~torch.isin(tokens[:10], torch.tensor([0, 1, 2]))]
    with torch.no_grad():
        output = sm.inference_model(sae)(x)
    fvu = (output - x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
    assert result.prefixes[-1].fvu == pytest.approx(fvu.item(), rel=1e-3)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_activations_normalised_at_run_time(
    normalize: Any, tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=64, normalize_activations=normalize))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.W_enc.data.normal_()
    sae.W_dec.data.normal_(std=0.1)
    result = sm.evaluate(sae, tiny_model, tokens, n_tokens=320, n_ce_tokens=0)
    _, cache = tiny_model.run_with_cache(tokens[:10])
    x = cache["blocks.1.hook_resid_post"][~torch.isin(tokens[:10], torch.tensor([0, 1, 2]))]
    with torch.no_grad():
        output = sae(x)
    fvu = (output - x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
    assert result.prefixes[-1].fvu == pytest.approx(fvu.item(), rel=1e-3)


def test_heads_are_read_together_or_one_by_one(tiny_model: HookedTransformer, tokens: torch.Tensor) -> None:
    name = "blocks.1.attn.hook_z"
    _, cache = tiny_model.run_with_cache(tokens[:4])
    z = cache[name]
    n_heads, d_head = z.shape[2:]

    def identity(d: int, **metadata: Any) -> Any:
        eye = torch.eye(d)
        cfg = JumpReLUSAEConfig(d_in=d, d_sae=2 * d, reshape_activations="none" if metadata else "hook_z")
        cfg.metadata = SAEMetadata(hook_name=name, **metadata)
        sae = JumpReLUSAE(cfg)
        sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye])
        sae.threshold.data.zero_()
        return sae

    whole = identity(n_heads * d_head)
    result = sm.evaluate(whole, tiny_model, tokens[:4], n_ce_tokens=100)
    assert result.prefixes[0].fvu == pytest.approx(0, abs=1e-6)
    assert result.prefixes[0].ce_recovered == pytest.approx(1, abs=1e-3)
    assert whole(z).shape == z.shape  # it reshapes by itself again
    one = sm.evaluate(identity(d_head, hook_head_index=1), tiny_model, tokens[:4], n_ce_tokens=100)
    assert one.prefixes[0].ce_recovered == pytest.approx(1, abs=1e-3)
    assert abs(one.ce_zero - one.ce_clean) < abs(result.ce_zero - result.ce_clean)


@pytest.mark.parametrize("kind", ["bridge", "huggingface"])
def test_other_kinds_of_model_give_the_same_metrics(
    kind: str, tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    transcoder = _stock_transcoder()
    expected = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=300, n_ce_tokens=300)
    if kind == "bridge":
        other: Any = tiny.load_bridge()
    else:
        # an HF model has the source only after the norm's gain
        other = tiny_models.proxy(tiny.load_hf_model())
        other.tokenizer = tiny.load_tokenizer()
        gain = sm.find_site(tiny_model, 2, "mlp_in").gain
        transcoder.W_enc.data /= gain[:, None]
        transcoder.cfg.metadata.hook_name = sm.find_site(other, 2, "mlp_in").hook_name
        transcoder.cfg.metadata.hook_name_out = sm.find_site(other, 2, "mlp_out").hook_name
    result = sm.evaluate(transcoder, other, tokens, n_tokens=300, n_ce_tokens=300)
    assert result.ce_clean == pytest.approx(expected.ce_clean, rel=1e-4)
    for row, other_row in zip(expected.prefixes, result.prefixes, strict=True):
        assert other_row.fvu == pytest.approx(row.fvu, rel=1e-3)
        assert other_row.l0 == pytest.approx(row.l0, rel=1e-3)
        assert other_row.ce == pytest.approx(row.ce, rel=1e-3)


def test_only_the_trained_positions_count(tiny_model: HookedTransformer, tokens: torch.Tensor) -> None:
    transcoder = _stock_transcoder(seqpos_slice=(4, 10))
    result = sm.evaluate(transcoder, tiny_model, tokens, n_tokens=64, exclude_special_tokens=False)
    assert result.n_tokens == 2 * 6


def test_text_is_tokenised_and_json_and_table_come_out(tiny_model: HookedTransformer) -> None:
    text = datasets.Dataset.from_dict({"text": ["def f(x):\n    return x\n" * 40] * 20})
    result = sm.evaluate(_stock_transcoder(), tiny_model, text, n_tokens=320, n_ce_tokens=0)
    parsed = json.loads(result.to_json())
    assert parsed["n_tokens"] == result.n_tokens > 200
    assert parsed["prefixes"][0]["ce"] is None
    assert parsed["prefixes"][1]["dead_fraction"] == result.prefixes[1].n_dead / 64
    assert len(result.table().rows) == 2
    assert result.table().caption == f"{result.n_tokens:,} tokens", "which may have been trained on"
    assert result.table().title == f"{result.hook_name} → {result.hook_name_out}"
    of_an_sae = dataclasses.replace(result, hook_name_out=result.hook_name)
    assert of_an_sae.table().title == result.hook_name


def test_a_model_without_a_record_of_its_data_is_evaluated(tiny_model: HookedTransformer) -> None:
    text = datasets.Dataset.from_dict({"text": ["def f(x):\n    return x\n" * 40] * 20})
    transcoder = _stock_transcoder(prepend_bos=None, context_size=None)
    with pytest.raises(ValueError, match="Give context_size"):
        sm.evaluate(transcoder, tiny_model, text, n_ce_tokens=0)
    told = sm.evaluate(transcoder, tiny_model, text, n_tokens=320, n_ce_tokens=0, context_size=32)
    assert told == sm.evaluate(_stock_transcoder(), tiny_model, text, n_tokens=320, n_ce_tokens=0)
    assert transcoder.cfg.metadata.prepend_bos is None


def test_missing_hook_and_empty_dataset_are_told(tiny_model: HookedTransformer, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="hook_name_out='blocks.2.mlp_out'"):
        sm.evaluate(_stock_transcoder(hook_name_out="blocks.2.mlp_out"), tiny_model, tokens)
    with pytest.raises(ValueError, match="dataset"):
        sm.evaluate(_stock_transcoder(), tiny_model, tokens[:0])
    with pytest.raises(ValueError, match="n_tokens=0 must be at least 1"):
        sm.evaluate(_stock_transcoder(), tiny_model, tokens, n_tokens=0)
    with pytest.raises(ValueError, match="hook_name: this model's metadata do not say"):
        sm.evaluate(_stock_transcoder(hook_name=None), tiny_model, tokens)
    empty = datasets.Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="empty"):
        sm.evaluate(_stock_transcoder(), tiny_model, empty)


def test_text_of_which_no_token_counts_is_told(tiny_model: HookedTransformer) -> None:
    special = torch.full((2, 8), tiny_model.tokenizer.bos_token_id)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="dataset: none of its tokens counts"):
        sm.evaluate(_stock_transcoder(), tiny_model, special)


def test_activations_of_all_heads_are_evaluated_flat() -> None:
    metadata = SAEMetadata(hook_name="blocks.1.attn.hook_z", matryoshka_widths=WIDTHS)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=64, reshape_activations="hook_z", metadata=metadata))
    rows = torch.randn(40, 128)
    result = evaluate_activations(sae, tiny.load_hooked_transformer(), [(rows, rows)])
    assert result.n_tokens == 40
    assert sae.hook_z_reshaping_mode


@pytest.mark.parametrize(
    ("details", "k"),
    [
        ({"k": 3, "matryoshka_widths": WIDTHS}, 3.0),
        ({"k": 3, "matryoshka_widths": [*WIDTHS, 128]}, None),  # 64 is a prefix
        ({"k": 2.5}, 2.5),
        ({"k": None}, None),
        ({"k": "many", "matryoshka_widths": ["all"]}, None),
    ],
    ids=str,
)
def test_what_a_model_says_of_its_training_is_shown_or_left_out(
    details: dict[str, Any], k: float | None, tiny_model: HookedTransformer
) -> None:
    sae = _stock_transcoder(training_architecture_details=details)
    pairs = [(torch.randn(8, 128), torch.randn(8, 128))]
    assert evaluate_activations(sae, tiny_model, pairs, with_redundancy=False).train_l0 == k


def test_prompts_of_another_length_than_asked_for_are_refused(
    tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="context_size=8, but the tokens given are prompts of 32"):
        sm.evaluate(_stock_transcoder(), tiny_model, tokens, context_size=8)


def test_tokens_of_any_integer_dtype_are_taken(tiny_model: HookedTransformer, tokens: torch.Tensor) -> None:
    few = tokens[:3].clamp(max=250)
    expected = sm.evaluate(_stock_transcoder(), tiny_model, few)
    for dtype in (torch.int32, torch.uint8):
        assert sm.evaluate(_stock_transcoder(), tiny_model, few.to(dtype)) == expected
    with pytest.raises(ValueError, match="dataset: a torch.bool tensor"):
        sm.evaluate(_stock_transcoder(), tiny_model, few > 0)


@pytest.mark.parametrize("length", [1, 257])
def test_prompts_of_a_length_that_cannot_be_are_refused(tiny_model: HookedTransformer, length: int) -> None:
    with pytest.raises(ValueError, match=f"context_size={length} must be from 2 to 256"):
        sm.evaluate(_stock_transcoder(), tiny_model, torch.full((2, length), 7))


@pytest.mark.parametrize("name", ["n_tokens", "n_ce_tokens", "batch_size_prompts", "context_size"])
def test_a_number_that_is_not_whole_is_refused(tiny_model: HookedTransformer, name: str) -> None:
    text = tiny.text.dataset("held_out")
    with pytest.raises(ValueError, match=rf"{name}=32.0 must be an integer"):
        sm.evaluate(_stock_transcoder(), tiny_model, text, **{"n_tokens": 100, name: 32.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("exclude", [1, ["<bos>"], "all"])
def test_what_is_no_choice_of_special_tokens_is_refused(
    tiny_model: HookedTransformer, tokens: torch.Tensor, exclude: Any
) -> None:
    with pytest.raises(ValueError, match="exclude_special_tokens=.* must be True, False or a list"):
        sm.evaluate(_stock_transcoder(), tiny_model, tokens, exclude_special_tokens=exclude)


def test_progress_counts_the_tokens_of_both_passes(
    tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    told: list[tuple[str, int, int]] = []
    few = {"n_tokens": tokens[:6].numel(), "n_ce_tokens": tokens[:3].numel(), "batch_size_prompts": 2}
    sm.evaluate(
        _stock_transcoder(),
        tiny_model,
        tokens,
        **few,
        exclude_special_tokens=False,
        on_progress=lambda *step: told.append(step),
    )
    length = tokens.shape[1]
    assert told == [
        *(("reconstruction", prompts * length, 6 * length) for prompts in (2, 4, 6)),
        *(("cross-entropy", prompts * length, 3 * length) for prompts in (2, 3)),
    ]
