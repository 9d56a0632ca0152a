from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

import saelens_matryoshka as sm
from saelens_matryoshka.prefixes import predict_prefixes
from tests.helpers import run_steps, sparse_batches, trainer_for

WIDTHS = [8, 24, 64]


def _trained(kind: str) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 64, "k": 4, "matryoshka_widths": WIDTHS}
    batches = sparse_batches(20, 128, 16)
    if kind == "sae":
        model: Any = sm.MatryoshkaTrainingSAE(sm.MatryoshkaTrainingSAEConfig(**settings))
    else:
        batches = [torch.cat([b, b[:, :10].relu()], dim=-1) for b in batches]
        settings |= {"d_out": 10, "hook_name_out": "out"}
        if kind == "transcoder":
            cfg: Any = sm.MatryoshkaTrainingTranscoderConfig(**settings)
            model = sm.MatryoshkaTrainingTranscoder(cfg)
        else:
            cfg = sm.MatryoshkaTrainingSkipTranscoderConfig(**settings)
            model = sm.MatryoshkaTrainingSkipTranscoder(cfg)
    run_steps(trainer_for(model, batches), batches)
    return model


@pytest.fixture(params=["sae", "transcoder", "skip"])
def trained(request: pytest.FixtureRequest) -> Any:
    return _trained(request.param)


def test_truncated_model_is_the_prefix_of_the_whole(trained: Any, tmp_path: Path) -> None:
    stock = sm.inference_model(trained)
    x = sparse_batches(1, 32, 16, seed=3)[0]
    acts = stock.encode(x)
    prefixes = predict_prefixes(stock, x, acts)
    for level, width in enumerate(WIDTHS):
        for model in (trained, stock):
            prefix = sm.truncate(model, width)
            assert prefix.cfg.d_sae == width
            assert sm.matryoshka_widths(prefix) == WIDTHS[: level + 1]
            torch.testing.assert_close(prefix.encode(x), acts[:, :width])
            torch.testing.assert_close(prefix(x), prefixes[level], rtol=1e-5, atol=1e-5)
        prefix.save_model(tmp_path / str(width))
        torch.testing.assert_close(SAE.load_from_disk(tmp_path / str(width))(x), prefix(x))


def test_last_prefix_is_what_the_model_decodes(trained: Any) -> None:
    x = sparse_batches(1, 32, 16)[0]
    for model in (trained, sm.inference_model(trained)):
        acts = model.encode(x)
        torch.testing.assert_close(
            sm.decode_prefixes(model, acts)[-1], model.decode(acts), rtol=1e-5, atol=1e-5
        )


def test_last_prefix_of_a_stock_transcoder_that_normalises_its_input() -> None:
    settings: dict[str, Any] = {"d_in": 16, "d_out": 10, "d_sae": 64, "apply_b_dec_to_input": False}
    metadata = SAEMetadata(matryoshka_widths=list(WIDTHS))
    model = JumpReLUTranscoder(
        JumpReLUTranscoderConfig(**settings, normalize_activations="layer_norm", metadata=metadata)
    )
    model.b_dec.data.normal_()
    acts = model.encode(torch.randn(32, 16))
    torch.testing.assert_close(sm.decode_prefixes(model, acts)[-1], model.decode(acts))


def test_decode_prefixes_keeps_batch_dimensions_and_takes_sparse_activations() -> None:
    stock = sm.inference_model(_trained("transcoder"))
    acts = stock.encode(torch.randn(2, 5, 16))
    outputs = sm.decode_prefixes(stock, acts)
    assert outputs.shape == (3, 2, 5, 10)
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        sparse = sm.decode_prefixes(stock, acts[0].to_sparse(layout=layout))
        torch.testing.assert_close(sparse, outputs[:, 0])


def test_truncating_shares_no_memory_and_changes_nothing() -> None:
    stock = sm.inference_model(_trained("sae"))
    prefix = sm.truncate(stock, 24)
    before = stock.W_dec.clone()
    prefix.W_dec.data.zero_()
    assert torch.equal(stock.W_dec, before)
    assert sm.matryoshka_widths(stock) == WIDTHS


def test_a_training_object_keeps_the_threshold_it_trains_with() -> None:
    trained = _trained("transcoder")  # calibrated when it is used
    before = {name: buffer.clone() for name, buffer in trained.named_buffers()}
    stock = sm.inference_model(trained)
    assert all(torch.equal(buffer, before[name]) for name, buffer in trained.named_buffers())
    trained.calibrate_threshold()
    assert not torch.equal(trained.topk_threshold, before["topk_threshold"])
    rescaled = trained.topk_threshold * trained.W_dec.norm(dim=-1)
    torch.testing.assert_close(stock.threshold, rescaled, check_dtype=False)


@pytest.mark.parametrize("scaled", ["expected_average_only_in", "covariance_whitening"])
def test_a_model_whose_scaling_is_not_folded_is_warned_of(scaled: str) -> None:
    trained = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig(
            d_in=8, d_sae=64, k=4, matryoshka_widths=WIDTHS, normalize_activations=scaled
        )
    )
    for sae in (trained, JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=64, normalize_activations=scaled))):
        with pytest.warns(UserWarning, match=rf"normalize_activations='{scaled}'.* is not folded"):
            sm.inference_model(sae)
    if scaled == "covariance_whitening":
        trained.fold_activation_whitening(torch.zeros(8), torch.eye(8), torch.eye(8))
    else:
        trained.fold_activation_norm_scaling_factor(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sm.inference_model(trained)


def test_a_compiled_model_has_the_prefixes_of_what_was_compiled() -> None:
    settings: dict[str, Any] = {"d_in": 8, "d_sae": 64, "k": 4, "matryoshka_widths": WIDTHS}
    settings |= {"hook_name_out": "out", "input_gain": "norm_weight"}
    settings |= {"normalize_activations": "expected_average_only_in"}
    trained = sm.MatryoshkaTrainingTranscoder(sm.MatryoshkaTrainingTranscoderConfig(**settings))
    trained.set_input_gain(torch.full((8,), 2.0))
    run_steps(trainer_for(trained, batches := sparse_batches(5, 128, 16)), batches)
    stock, x = sm.inference_model(trained), torch.randn(5, 8)
    compiled: Any = torch.compile(trained)
    assert torch.equal(sm.inference_model(compiled)(x), stock(x))
    assert torch.equal(sm.truncate(compiled, 8)(x), sm.truncate(stock, 8)(x))
    assert torch.equal(sm.truncate(torch.compile(stock), 8)(x), sm.truncate(stock, 8)(x))  # type: ignore[arg-type]
    acts = trained.encode(x)
    assert torch.equal(sm.decode_prefixes(compiled, acts), sm.decode_prefixes(trained, acts))


def test_widths_of_stock_saelens_matryoshka_are_read_from_its_metadata(tmp_path: Path) -> None:
    stock = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(d_in=16, d_sae=64, k=4, matryoshka_widths=list(WIDTHS))
    )
    stock.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is JumpReLUSAE
    assert sm.matryoshka_widths(loaded) == WIDTHS
    assert sm.truncate(loaded, 8).cfg.d_sae == 8


def test_a_model_without_recorded_widths_has_one_prefix() -> None:
    stock = sm.inference_model(_trained("sae"))
    del stock.cfg.metadata.matryoshka_widths
    del stock.cfg.metadata.training_architecture_details
    assert sm.matryoshka_widths(stock) == [64]


@pytest.mark.parametrize("width", [0, -1, 65, 8.0, True])
def test_impossible_width_is_refused(width: Any) -> None:
    with pytest.raises(ValueError, match="width="):
        sm.truncate(_trained("sae"), width)


def test_width_between_the_trained_prefixes_warns() -> None:
    with pytest.warns(UserWarning, match="not one of the trained prefixes"):
        assert sm.truncate(_trained("sae"), 9).cfg.d_sae == 9


def test_topk_model_has_no_prefix_of_its_own() -> None:
    with pytest.raises(ValueError, match="topk"):
        sm.truncate(TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)), 4)
