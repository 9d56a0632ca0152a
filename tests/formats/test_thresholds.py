from __future__ import annotations

import dataclasses

import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka.formats import FormatError, SparseCoder, build
from saelens_matryoshka.formats.thresholds import calibrate, fit_threshold, hook_rows, keep_topk
from tests.formats.coders import LATENTS, inputs, random_coder


def _l0(coder: SparseCoder, x: torch.Tensor) -> float:
    return (build(coder).encode(x) > 0).float().sum(dim=-1).mean().item()


@pytest.mark.parametrize("kind", [{"activation": "topk"}, {}, {"transcoder": False}, {"skip": True}], ids=str)
@pytest.mark.parametrize("l0", [1, 4.5, 12])
def test_the_fitted_model_has_the_wanted_l0(kind: dict, l0: float) -> None:
    x = inputs(2000)
    fitted = fit_threshold(random_coder(**kind), x, l0)
    assert _l0(fitted, x) == pytest.approx(l0, abs=1 / len(x))
    assert fitted.k is None
    assert "L0 of" in fitted.metadata["inference_activation"]


def test_a_normalised_input_is_normalised_for_the_fit_too() -> None:
    x = 5 * inputs(2000) + 2
    coder = dataclasses.replace(random_coder("topk", transcoder=False), layer_norm=True)
    assert _l0(fit_threshold(coder, x, 4), x) == pytest.approx(4, abs=1e-3)


def test_topk_weights_are_kept_and_latents_of_another_scale_are_compared_by_contribution() -> None:
    x = inputs(2000)
    coder = random_coder("topk")
    fitted = fit_threshold(coder, x, 5)
    assert fitted.threshold is not None
    assert len(fitted.threshold.unique()) == 1, "TopK compares the pre-activations themselves"
    assert fitted.W_dec is coder.W_dec
    scales = torch.rand(LATENTS) + 0.2
    jumprelu = random_coder()
    assert jumprelu.threshold is not None
    rescaled = jumprelu.with_tensors(
        W_enc=jumprelu.W_enc * scales,
        b_enc=jumprelu.b_enc * scales,
        threshold=jumprelu.threshold * scales,
        W_dec=jumprelu.W_dec / scales[:, None],
    )
    expected = fit_threshold(jumprelu, x, 5).threshold
    assert expected is not None
    torch.testing.assert_close(fit_threshold(rescaled, x, 5).threshold, expected * scales)


@pytest.mark.parametrize("l0", [0, -1, 49, float("nan")])
def test_an_impossible_l0_is_refused(l0: float) -> None:
    with pytest.raises(FormatError, match="l0="):
        fit_threshold(random_coder(), inputs(), l0)


def _on_tiny(**metadata: object) -> SparseCoder:
    generator = torch.Generator().manual_seed(0)
    return SparseCoder(
        W_enc=torch.randn(128, 64, generator=generator),
        b_enc=torch.zeros(64),
        W_dec=torch.randn(64, 128, generator=generator),
        b_dec=torch.zeros(128),
        k=6,
        W_skip=torch.eye(128),
        metadata={
            "hook_name": "blocks.1.ln2.hook_normalized",
            "hook_name_out": "blocks.1.hook_mlp_out",
            **metadata,
        },
    )


def test_a_topk_skip_transcoder_gets_thresholds_from_a_language_model(
    tiny_model: HookedTransformer, token_dataset: object
) -> None:
    fitted = calibrate(_on_tiny(context_size=32), tiny_model, token_dataset, n_tokens=2000)
    assert build(fitted).cfg.architecture() == "jumprelu_skip_transcoder"
    hook = "blocks.1.ln2.hook_normalized"
    rows = torch.cat([rows[hook] for rows in hook_rows(fitted, tiny_model, token_dataset, 2000)])
    assert _l0(fitted, rows) == pytest.approx(6, abs=0.01)


def test_special_tokens_are_left_out_and_long_contexts_are_cut(tiny_model: HookedTransformer) -> None:
    tokens = torch.randint(3, 1000, (4, 32))
    tokens[:, 0] = 0
    coder = _on_tiny(context_size=4096)
    hook = coder.metadata["hook_name"]
    rows = torch.cat([rows[hook] for rows in hook_rows(coder, tiny_model, tokens, 4 * 32)])
    assert rows.shape == (4 * 31, 128)
    _, cache = tiny_model.run_with_cache(tokens)
    torch.testing.assert_close(rows, cache[hook][:, 1:].flatten(0, 1))


def test_without_a_k_the_l0_must_be_given(tiny_model: HookedTransformer, token_dataset: object) -> None:
    coder = _on_tiny().with_tensors(k=None)
    with pytest.raises(FormatError, match="--l0"):
        calibrate(coder, tiny_model, token_dataset)
    with pytest.raises(ValueError, match="is not a hook"):
        calibrate(_on_tiny(hook_name="blocks.9.x"), tiny_model, token_dataset)


def test_topk_in_place_of_thresholds_is_said_to_be_another_function() -> None:
    changed = keep_topk(random_coder(), 3)
    assert (changed.k, changed.threshold) == (3, None)
    assert "in place of" in changed.metadata["inference_activation"]
    with pytest.raises(FormatError, match="k=49"):
        keep_topk(random_coder(), 49)
