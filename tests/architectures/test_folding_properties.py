"""Folding changes what the weights read and write, never what is computed: scaling, norms, gain, skip."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelens_matryoshka as sm

positive = st.floats(0.01, 100)
seeds = st.integers(0, 1 << 16)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 5))


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def _randomise(model: Any, seed: int, threshold: float) -> Any:
    """Weights as if trained, in float64: rounding must not decide what is active."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(_normal(seed + index, *parameter.shape))
        model.topk_threshold.fill_(threshold)
    return model


def _sae(size: tuple[int, int, int], rescale: bool, subtract: bool, **fields: Any) -> Any:
    d_in, d_sae, _ = size
    return sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=1,
            matryoshka_widths=[d_sae],
            rescale_acts_by_decoder_norm=rescale,
            apply_b_dec_to_input=subtract,
            dtype="float64",
            **fields,
        )
    )


def _transcoder(size: tuple[int, int, int], rescale: bool, skip: bool, gain: bool, **fields: Any) -> Any:
    d_in, d_sae, d_out = size
    kind: Any = (sm.MatryoshkaTrainingTranscoder, sm.MatryoshkaTrainingTranscoderConfig)
    if skip:
        kind = (sm.MatryoshkaTrainingSkipTranscoder, sm.MatryoshkaTrainingSkipTranscoderConfig)
    return kind[0](
        kind[1](
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            k=1,
            matryoshka_widths=[d_sae],
            rescale_acts_by_decoder_norm=rescale,
            hook_name_out="blocks.0.hook_mlp_out",
            input_gain="norm_weight" if gain else "none",
            dtype="float64",
            **fields,
        )
    )


@given(sizes, st.booleans(), st.booleans(), st.floats(0, 3), seeds)
def test_decoder_norms_fold_into_a_stock_sae(
    size: tuple[int, int, int], rescale: bool, subtract: bool, threshold: float, seed: int
) -> None:
    model = _randomise(_sae(size, rescale, subtract), seed, threshold)
    stock = sm.inference_model(model)
    x = _normal(seed - 1, 4, size[0])
    torch.testing.assert_close(stock(x), model(x))
    torch.testing.assert_close(stock.W_dec.norm(dim=-1), torch.ones(size[1], dtype=torch.double))
    assert torch.equal(stock.encode(x) > 0, model.encode(x) > 0)


@given(sizes, st.booleans(), st.booleans(), st.floats(0, 3), positive, seeds)
def test_activation_scaling_folds_into_an_sae(
    size: tuple[int, int, int], rescale: bool, subtract: bool, threshold: float, scale: float, seed: int
) -> None:
    fields = {"normalize_activations": "expected_average_only_in"}
    model = _randomise(_sae(size, rescale, subtract, **fields), seed, threshold)
    x = _normal(seed - 1, 4, size[0])
    expected = model(x * scale) / scale
    model.fold_activation_norm_scaling_factor(scale)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(sm.inference_model(model)(x), expected)


@given(sizes, st.booleans(), st.booleans(), st.floats(0, 3), positive, positive, positive, seeds)
def test_scales_of_source_and_target_gain_and_skip_fold_into_a_transcoder(
    size: tuple[int, int, int],
    rescale: bool,
    skip: bool,
    threshold: float,
    scale: float,
    source: float,
    target: float,
    seed: int,
) -> None:
    """The same from the raw hook, whether the trainer's factor is folded before or not."""
    fields = {"normalize_activations": "expected_average_only_in"}
    model = _randomise(_transcoder(size, rescale, skip, gain=True, **fields), seed, threshold)
    gain, offset = _normal(seed - 2, size[0]) + 2, _normal(seed - 3, size[0])
    gain, offset = gain.float(), offset.float()  # as a language model has them
    model.set_input_gain(gain, offset)
    model.source_scale.fill_(source)
    model.target_scale.fill_(target)
    raw = _normal(seed - 1, 4, size[0])
    read = raw * gain + offset
    torch.testing.assert_close(sm.inference_model(model)(raw), model(read))
    expected = model(read * scale) / scale
    model.fold_activation_norm_scaling_factor(scale)
    torch.testing.assert_close(model(read), expected)
    torch.testing.assert_close(sm.inference_model(model)(raw), expected)


@settings(max_examples=20)
@given(sizes, st.booleans(), st.sampled_from(["float32", "bfloat16"]), seeds)
def test_a_dead_decoder_row_folds_to_nothing_and_never_to_nan(
    size: tuple[int, int, int], rescale: bool, dtype: str, seed: int
) -> None:
    model = _randomise(_sae(size, rescale, True), seed, 0.5)
    model = model.to(getattr(torch, dtype))
    with torch.no_grad():
        model.W_dec[0] = 0
    stock = sm.inference_model(model)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stock.state_dict().values())
    assert bool((stock.W_dec[0] == 0).all())
