from __future__ import annotations

import json
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from sae_lens import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
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
    assert result.n_ce_tokens == int(keep[:, 1:].sum())

    def ce(replacement: torch.Tensor | None) -> float:
        def replace(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            if replacement is None:
                return activation
            return torch.where(keep[..., None], replacement, activation)

        with torch.no_grad():
            logits = tiny_model.run_with_hooks(tokens, fwd_hooks=[(TARGET, replace)])
        counted = keep[:, 1:]
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
        assert row.width == width
        assert row.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert row.l0 == pytest.approx((acts > 0).sum(-1).float().mean().item(), rel=1e-4)
        assert row.n_dead == int((acts > 0).sum(0).eq(0).sum())
        assert row.ce == pytest.approx(ce(output), rel=1e-4)
        recovered = (zero - ce(output)) / (zero - untouched)
        assert row.ce_recovered == pytest.approx(recovered, rel=1e-2)


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


def test_missing_hook_and_empty_dataset_are_told(tiny_model: HookedTransformer, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="hook_name_out='blocks.2.mlp_out'"):
        sm.evaluate(_stock_transcoder(hook_name_out="blocks.2.mlp_out"), tiny_model, tokens)
    with pytest.raises(ValueError, match="dataset"):
        sm.evaluate(_stock_transcoder(), tiny_model, tokens[:0])
    empty = datasets.Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="empty"):
        sm.evaluate(_stock_transcoder(), tiny_model, empty)
