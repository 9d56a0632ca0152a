from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSkipTranscoder, JumpReLUTranscoder, TrainingSAE
from safetensors.torch import load_file, save_file

import saelens_matryoshka as sm
from tests.helpers import run_steps, sparse_batches, trainer_for

D_IN, D_OUT = 24, 16
SETTINGS: dict[str, Any] = {
    "d_in": D_IN,
    "d_out": D_OUT,
    "d_sae": 128,
    "k": 6,
    "matryoshka_widths": [16, 48, 128],
    "hook_name_out": "blocks.0.hook_mlp_out",
}
KINDS = {
    "plain": (sm.MatryoshkaTrainingTranscoder, sm.MatryoshkaTrainingTranscoderConfig),
    "skip": (sm.MatryoshkaTrainingSkipTranscoder, sm.MatryoshkaTrainingSkipTranscoderConfig),
}


def _transcoder(kind: str = "plain", **change: Any) -> Any:
    sae_class, cfg_class = KINDS[kind]
    torch.manual_seed(1)
    return sae_class(cfg_class(**{**SETTINGS, **change}))


def _pairs(n_batches: int, batch_size: int = 256) -> list[torch.Tensor]:
    """Rows of [source | target], the target a fixed nonlinear function of the source."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(D_IN, D_OUT, generator=generator) / D_IN**0.5
    sources = sparse_batches(n_batches, batch_size, D_IN)
    return [torch.cat([x, 5 + 3 * (x @ mix).relu()], dim=-1) for x in sources]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_target_in_every_prefix(kind: str) -> None:
    pairs = _pairs(150)
    outputs = run_steps(trainer_for(_transcoder(kind), pairs, lr=3e-3), pairs)
    metrics = [outputs[-1].metrics[f"fvu_w{w}"]().item() for w in (16, 48, 128)]
    assert metrics == sorted(metrics, reverse=True)
    assert metrics[-1] < 0.4
    assert metrics[0] < 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalize_activations": "expected_average_only_in"},
        {"rescale_acts_by_decoder_norm": False},
        {
            "normalize_activations": "expected_average_only_in",
            "rescale_acts_by_decoder_norm": False,
        },
        {"selection": "token"},
    ],
    ids=str,
)
@pytest.mark.parametrize("gain", [False, True], ids=["no gain", "gain"])
def test_saved_model_is_stock_and_does_the_same_from_the_raw_hook(
    kind: str, change: dict[str, Any], gain: bool, tmp_path: Path
) -> None:
    raw, pairs = _pairs(40), _pairs(40)
    weight, bias = torch.rand(D_IN) + 0.5, torch.randn(D_IN)
    transcoder = _transcoder(kind, input_gain="norm_weight" if gain else "none", **change)
    if gain:
        transcoder.set_input_gain(weight, bias)
        for pair in pairs:
            pair[:, :D_IN] = pair[:, :D_IN] * weight + bias
    trainer_for(transcoder, pairs, total_training_samples=256 * 30).fit()
    transcoder.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is (JumpReLUTranscoder if kind == "plain" else JumpReLUSkipTranscoder)
    assert loaded.cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out"
    x_raw, x = raw[-1][:, :D_IN], pairs[-1][:, :D_IN]
    assert (loaded.encode(x_raw) > 0).any()
    torch.testing.assert_close(loaded(x_raw), transcoder.eval()(x), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(128))


def test_source_and_target_are_scaled_by_a_factor_each() -> None:
    pairs = _pairs(5)
    for pair in pairs:
        pair[:, :D_IN] *= 100
    transcoder = _transcoder(normalize_activations="expected_average_only_in")
    trainer = trainer_for(transcoder, pairs)
    trainer.activation_scaler.scaling_factor = 0.1  # what SAELens estimates from the packed batch
    trainer.step(pairs[0])
    source, target = transcoder.split_batch(0.1 * pairs[0])
    assert source.norm(dim=-1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-4)
    assert target.norm(dim=-1).mean().item() == pytest.approx(D_OUT**0.5, rel=1e-4)


def test_training_starts_where_the_data_is() -> None:
    pairs = _pairs(1)
    transcoder = _transcoder()
    transcoder.prepare_for_training(pairs[0])
    source, target = transcoder.split_batch(pairs[0])
    torch.testing.assert_close(transcoder.b_dec.data, target.mean(dim=0))
    pre = source @ transcoder.W_enc + transcoder.b_enc
    torch.testing.assert_close(pre.mean(dim=0), torch.zeros(128), atol=1e-4, rtol=0)


def test_resuming_does_not_start_from_the_data_again(tmp_path: Path) -> None:
    pairs = _pairs(4)
    transcoder = _transcoder(normalize_activations="expected_average_only_in")
    run_steps(trainer_for(transcoder, pairs), pairs[:2])
    transcoder.save_model(tmp_path)
    expected = run_steps(trainer_for(transcoder, pairs), pairs[2:3])[0].loss
    resumed = _transcoder(normalize_activations="expected_average_only_in")
    resumed.load_weights_from_checkpoint(tmp_path)
    torch.testing.assert_close(run_steps(trainer_for(resumed, pairs), pairs[2:3])[0].loss, expected)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    torch.testing.assert_close(run_steps(trainer_for(loaded, pairs), pairs[2:3])[0].loss, expected)


def test_a_state_dict_is_trained_on_with_its_scales() -> None:
    first, other = _pairs(2)
    trained, again = (_transcoder(normalize_activations="expected_average_only_in") for _ in range(2))
    run_steps(trainer_for(trained, [first]), [first])
    again.load_state_dict(trained.state_dict())
    run_steps(trainer_for(again, [3 * other]), [3 * other])
    assert torch.equal(again.source_scale, trained.source_scale)
    assert torch.equal(again.target_scale, trained.target_scale)


def test_gain_and_scales_are_loaded_unrounded_whatever_the_weights_are(tmp_path: Path) -> None:
    transcoder = _transcoder(input_gain="norm_weight", dtype="bfloat16")
    transcoder.set_input_gain(1 + torch.rand(D_IN) / 100, torch.rand(D_IN) * 1e-5)
    transcoder.source_scale.fill_(torch.pi)
    transcoder.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.W_dec.dtype == torch.bfloat16
    for name, buffer in transcoder.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    direct, again = tmp_path / "direct", tmp_path / "again"
    transcoder.save_inference_model(direct)
    loaded.save_inference_model(again)
    weights = "sae_weights.safetensors"
    assert (direct / weights).read_bytes() == (again / weights).read_bytes()


def test_saving_without_the_gain_is_refused(tmp_path: Path) -> None:
    transcoder = _transcoder(input_gain="norm_weight")
    with pytest.raises(ValueError, match="set_input_gain"):
        transcoder.save_inference_model(tmp_path)


def test_gain_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="d_in=24"):
        _transcoder(input_gain="norm_weight").set_input_gain(torch.ones(5))
    with pytest.raises(ValueError, match="norm's bias has shape"):
        _transcoder(input_gain="norm_weight").set_input_gain(torch.ones(D_IN), torch.ones(1))


def test_batch_that_is_not_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="d_in \\+ d_out = 40"):
        _transcoder().split_batch(torch.randn(4, D_IN))


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stop_before_the_weights_are_touched(where: str, value: float) -> None:
    pairs = _pairs(3)
    transcoder = _transcoder()
    transcoder.cfg.metadata.hook_name = "blocks.0.hook_resid_mid"
    trainer = trainer_for(transcoder, pairs)
    run_steps(trainer, pairs[:2])
    before = {name: tensor.clone() for name, tensor in transcoder.state_dict().items()}
    pairs[2][7, 0 if where == "source" else -1] = value
    hook = "blocks.0.hook_resid_mid" if where == "source" else "blocks.0.hook_mlp_out"
    with pytest.raises(sm.NonFiniteActivationsError, match=f"Step 2: the {where}.*{hook}.*1 of 256"):
        trainer.step(pairs[2])
    for name, tensor in transcoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


STOCK_ONLY = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "saelens_matryoshka":
            raise ImportError("not installed here")
sys.meta_path.insert(0, Blocked())
from sae_lens import SAE
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder)
    x = load_file(folder + "/input.safetensors")["x"]
    save_file({"y": sae(x), "acts": sae.encode(x)}, folder + "/output.safetensors")
assert "saelens_matryoshka" not in sys.modules
"""


def test_stock_saelens_loads_it_where_this_package_is_not_importable(tmp_path: Path) -> None:
    sae_config = sm.MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=64, k=4, matryoshka_widths=[16, 64])
    models: dict[str, Any] = {kind: _transcoder(kind) for kind in KINDS}
    models["sae"] = sm.MatryoshkaTrainingSAE(sae_config)
    inputs = {}
    for kind, model in models.items():
        batches = sparse_batches(20, 128, D_IN) if kind == "sae" else _pairs(20)
        run_steps(trainer_for(model, batches), batches)
        model.save_inference_model(tmp_path / kind)
        inputs[kind] = batches[-1][:, :D_IN].contiguous()
        save_file({"x": inputs[kind]}, tmp_path / kind / "input.safetensors")
    folders = [str(tmp_path / kind) for kind in models]
    subprocess.run([sys.executable, "-c", STOCK_ONLY, *folders], check=True)
    for kind, model in models.items():
        output = load_file(tmp_path / kind / "output.safetensors")
        torch.testing.assert_close(output["y"], model.eval()(inputs[kind]), rtol=1e-5, atol=1e-5)
        assert (output["acts"] > 0).any(), kind
        metadata = json.loads((tmp_path / kind / "cfg.json").read_text())["metadata"]
        assert metadata["matryoshka_widths"] == model.cfg.matryoshka_widths
