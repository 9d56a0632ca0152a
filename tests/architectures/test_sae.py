from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from safetensors.torch import save_file

import saelens_matryoshka as sm
from saelens_matryoshka.ops import reference_step, screen
from tests.helpers import run_steps, sparse_batches, trainer_for

SETTINGS: dict[str, Any] = {"d_in": 32, "d_sae": 256, "k": 5, "matryoshka_widths": [16, 64, 256]}


def _ours(**change: Any) -> sm.MatryoshkaTrainingSAE:
    torch.manual_seed(1)
    return sm.MatryoshkaTrainingSAE(sm.MatryoshkaTrainingSAEConfig(**{**SETTINGS, **change}))


@pytest.mark.parametrize("per_level_aux", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("step", ["sparse", "screened", "reference"])
def test_same_losses_as_stock_matryoshka_batchtopk_for_50_steps(
    per_level_aux: bool, rescale: bool, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _screen(monkeypatch, step == "screened")
    change = {"use_matryoshka_aux_loss": per_level_aux, "rescale_acts_by_decoder_norm": rescale}
    batches = sparse_batches(50, 256, 32)
    ours = _ours(**change)
    if step == "reference":
        ours.step_fn = reference_step
    torch.manual_seed(1)
    stock = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**{**SETTINGS, **change}))
    our_trainer, stock_trainer = trainer_for(ours, batches), trainer_for(stock, batches)
    expected, actual = run_steps(stock_trainer, batches), run_steps(our_trainer, batches)
    for one, other in zip(expected, actual, strict=True):
        assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
        assert other.losses.keys() == one.losses.keys()
        for name, loss in one.losses.items():
            assert other.losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert ours.topk_threshold.item() == pytest.approx(stock.topk_threshold.item(), rel=1e-5)
    assert stock_trainer.dead_neurons.any()  # so that the auxiliary loss was compared as well
    assert torch.equal(our_trainer.dead_neurons, stock_trainer.dead_neurons)


def _screen(monkeypatch: pytest.MonkeyPatch, screened: bool) -> None:
    """Make the step screen its candidates or not, whatever the sizes and the machine."""
    monkeypatch.setattr(screen, "pays", lambda *_: screened)
    monkeypatch.setattr(screen, "_MAX_SHARE", 2)


@pytest.mark.slow
def test_loss_trajectories_of_200_steps_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = sparse_batches(200, 256, 32)
    losses = {}
    for name in ("sparse", "screened", "reference", "stock"):
        _screen(monkeypatch, name == "screened")
        torch.manual_seed(1)
        if name == "stock":
            sae: Any = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**SETTINGS))
        else:
            sae = _ours()
            if name == "reference":
                sae.step_fn = reference_step
        outputs = run_steps(trainer_for(sae, batches), batches)
        losses[name] = torch.tensor([output.loss.item() for output in outputs])
    for other in ("screened", "reference", "stock"):
        torch.testing.assert_close(losses["sparse"], losses[other], rtol=1e-4, atol=0)


def test_one_width_trains_a_plain_batchtopk_sae() -> None:
    batches = sparse_batches(5, 64, 32)
    output = run_steps(trainer_for(_ours(matryoshka_widths=[256]), batches), batches)[-1]
    assert set(output.losses) == {"mse_loss", "auxiliary_reconstruction_loss"}


@pytest.mark.parametrize(
    ("shape", "n_dead", "says"),
    [
        ((2, 4, 32), None, r"sae_in has shape \[2, 4, 32\]"),
        ((32,), None, r"sae_in has shape \[32\]"),
        ((0, 32), None, r"sae_in has shape \[0, 32\]"),
        ((4, 31), None, r"31 columns, but d_in=32"),
        ((4, 32), 255, r"dead_neuron_mask has shape \[255\], .* 256 latents"),
        ((4, 32), 257, r"dead_neuron_mask has shape \[257\], .* 256 latents"),
    ],
)
def test_a_step_on_what_is_no_batch_is_refused(shape: tuple[int, ...], n_dead: int | None, says: str) -> None:
    dead = None if n_dead is None else torch.ones(n_dead, dtype=torch.bool)
    step_input = TrainStepInput(torch.randn(shape), {}, dead, 0, is_logging_step=False)
    with pytest.raises(ValueError, match=says):
        _ours().training_forward_pass(step_input)


def test_metrics_of_a_step() -> None:
    batches = sparse_batches(3, 128, 32)
    trainer = trainer_for(_ours(), batches)
    output = run_steps(trainer, batches)[-1]
    logged = trainer.build_train_step_log_dict(output, 1)
    levels = [output.losses[f"inner_mse_loss_{w}"].item() for w in (16, 64)]
    levels.append(output.losses["mse_loss"].item())
    variance = (batches[-1] - batches[-1].mean(0)).pow(2).sum(-1).mean().item()
    for width, level in zip((16, 64, 256), levels, strict=True):
        assert logged[f"metrics/fvu_w{width}"] == pytest.approx(level / variance, rel=1e-4)
    assert logged["metrics/fvu"] == pytest.approx(1 - logged["metrics/explained_variance"], rel=1e-3)
    assert logged["metrics/prefix_l2_min"] == pytest.approx(min(levels))
    assert logged["metrics/prefix_l2_max"] == pytest.approx(max(levels))
    assert logged["metrics/l0"] == pytest.approx(5)
    assert logged["metrics/dead_fraction"] == 0
    assert logged["metrics/topk_threshold"] > 0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "covariance_whitening"},
        {"selection": "token", "threshold_calibration": "l0"},
        {"apply_b_dec_to_input": False},
    ],
    ids=str,
)
def test_saved_model_is_a_stock_jumprelu_that_does_the_same(change: dict[str, Any], tmp_path: Path) -> None:
    batches = sparse_batches(30, 256, 32)
    sae = _ours(**change)
    trainer_for(sae, batches, total_training_samples=256 * 25).fit()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is JumpReLUSAE
    assert sm.matryoshka_widths(loaded) == [16, 64, 256]
    x = batches[-1]
    torch.testing.assert_close(loaded(x), sae.eval()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(256))
    assert (loaded.encode(x) > 0).any()


def test_inference_model_is_what_saving_and_loading_gives(tmp_path: Path) -> None:
    batches = sparse_batches(5, 128, 32)
    sae = _ours()
    run_steps(trainer_for(sae, batches), batches)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    direct = sm.inference_model(sae)
    sae.save_inference_model(tmp_path)
    for name, tensor in SAE.load_from_disk(tmp_path).state_dict().items():
        assert torch.equal(tensor, direct.state_dict()[name]), name
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_checkpoint_weights_load_again(tmp_path: Path) -> None:
    batches = sparse_batches(5, 128, 32)
    sae = _ours()
    run_steps(trainer_for(sae, batches), batches)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, sm.MatryoshkaTrainingSAE)
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-6, atol=0)
    # the layout in which the encoder's gradient is made is kept
    assert loaded.W_enc.T.is_contiguous()
    assert sae.W_enc.T.is_contiguous()


def test_state_dict_is_saved_and_loaded_by_torch_and_safetensors(tmp_path: Path) -> None:
    sae, wrapped = _ours(), torch.nn.Sequential(_ours())
    torch.nn.init.normal_(sae.W_enc)
    save_file(sae.state_dict(), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(sae.cfg.to_dict()))
    loaded = TrainingSAE.load_from_disk(tmp_path)
    wrapped.load_state_dict({f"0.{name}": tensor for name, tensor in sae.state_dict().items()})
    for state in (loaded.state_dict(prefix="0."), wrapped.state_dict()):
        for name, tensor in sae.state_dict().items():
            assert torch.equal(state[f"0.{name}"], tensor), name
            assert state[f"0.{name}"].is_contiguous()
    assert sae.state_dict(keep_vars=True)["W_enc"] is sae.W_enc
    assert loaded.W_enc.T.is_contiguous()
    assert wrapped[0].W_enc.T.is_contiguous()


def test_threshold_stays_in_double_precision_whatever_the_weights_are(tmp_path: Path) -> None:
    sae = _ours(dtype="bfloat16")
    sae.to(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    assert sae.topk_threshold.dtype == torch.float64
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert loaded.topk_threshold.dtype == torch.float64
    sae.topk_threshold.fill_(1.00001)
    sae.save_model(tmp_path)
    resumed = _ours(dtype="bfloat16")
    resumed.load_weights_from_checkpoint(tmp_path)
    assert resumed.topk_threshold.item() == 1.00001
    for dtype in ("bfloat16", "float32", "float64"):
        assert TrainingSAE.load_from_disk(tmp_path, dtype=dtype).topk_threshold.item() == 1.00001


def test_bfloat16_weights_train() -> None:
    batches = sparse_batches(40, 128, 32)
    sae = _ours(dtype="bfloat16")
    outputs = run_steps(trainer_for(sae, batches), [b.bfloat16() for b in batches])
    fvu = [output.metrics["fvu"]().item() for output in outputs]
    assert fvu[-1] < 0.9 * fvu[0]


@pytest.mark.parametrize("selection", ["batch", "token"])
def test_l0_calibrated_threshold_keeps_k_latents_at_inference(selection: str) -> None:
    batches = sparse_batches(220, 512, 32)
    sae = _ours(selection=selection, threshold_calibration="l0")
    trainer = trainer_for(sae, batches[:200], total_training_samples=200 * 512, lr_decay_steps=100)
    run_steps(trainer, batches[:200])

    def l0(of: list[torch.Tensor]) -> float:
        return torch.cat([(sae.encode(batch) > 0).sum(dim=-1) for batch in of]).float().mean().item()

    calibrated_on = [batch[::4] for batch in batches[72:200]]  # 128 rows of each
    assert l0(calibrated_on) == pytest.approx(5, rel=1e-3)
    assert l0(batches[200:]) == pytest.approx(5, rel=0.04)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_whitened_sae_is_saved_as_one_of_the_raw_activations(rescale: bool) -> None:
    sae = _ours(
        normalize_activations="covariance_whitening",
        rescale_acts_by_decoder_norm=rescale,
        threshold_calibration="l0",
        dtype="float64",
    )
    x = (torch.randn(100, 32) @ torch.randn(32, 32) + 1).double()
    sae.W_dec.data *= torch.rand(256, 1) + 0.1
    unwhitening = torch.linalg.cholesky(x.T.cov()).T
    whitening, mean = torch.linalg.inv(unwhitening), x.mean(dim=0)
    white = (x - mean) @ whitening
    step = TrainStepInput(
        sae_in=white, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    sae.training_forward_pass(step)
    acts = sae.encode(white)
    assert (acts > 0).sum(dim=-1).double().mean() == 5  # k
    expected = sae.decode(acts) @ unwhitening + mean
    sae.fold_activation_whitening(mean, whitening, unwhitening)
    saved = sm.inference_model(sae)
    assert torch.equal(saved.encode(x) > 0, acts > 0)
    torch.testing.assert_close(saved(x), expected)


def test_inference_does_not_move_the_threshold_or_depend_on_the_batch() -> None:
    batches = sparse_batches(10, 128, 32)
    sae = _ours()
    run_steps(trainer_for(sae, batches), batches)
    threshold = sae.topk_threshold.clone()
    whole, alone = sae.encode(batches[0]), sae.encode(batches[0][:1])
    torch.testing.assert_close(whole[:1], alone)
    assert torch.equal(sae.topk_threshold, threshold)


def test_l1_pushes_activations_down() -> None:
    batches = sparse_batches(60, 128, 32)
    l1 = []
    for coefficient in (0.0, 5.0):
        sae = _ours(l1_coefficient=coefficient)
        acts = run_steps(trainer_for(sae, batches), batches)[-1].feature_acts
        l1.append(acts.to_dense().sum().item())
    assert l1[1] < 0.9 * l1[0]


@pytest.mark.parametrize("screened", [False, True])
def test_compiled_training_gives_the_same_losses(screened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _screen(monkeypatch, screened)
    batches = sparse_batches(5, 64, 32)
    plain, compiled = _ours(), _ours()
    compiled.training_forward_pass = torch.compile(  # type: ignore[method-assign]
        compiled.training_forward_pass, backend="aot_eager"
    )
    one = run_steps(trainer_for(plain, batches), batches)
    other = run_steps(trainer_for(compiled, batches), batches)
    for a, b in zip(one, other, strict=True):
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-5)


def test_compiling_traces_nothing_that_would_have_to_be_traced_at_every_step() -> None:
    batches, traced = sparse_batches(4, 64, 32), []
    sae = _ours(threshold_calibration="l0")

    def backend(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend=backend)  # type: ignore[method-assign]
    run_steps(trainer_for(sae, batches), batches)
    assert sae.recent.count() == 4 * 64
    assert not traced


def test_synthetic_runner_trains_it(tmp_path: Path) -> None:
    result = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=64, hidden_dim=32),
            sae=sm.MatryoshkaTrainingSAEConfig(**SETTINGS),
            training_samples=64 * 20,
            batch_size=64,
            eval_samples=256,
            output_path=str(tmp_path / "out"),
            logger=LoggingConfig(log_to_wandb=False),
        )
    ).run()
    assert isinstance(result.sae, sm.MatryoshkaTrainingSAE)
    assert type(SAE.load_from_disk(tmp_path / "out")) is JumpReLUSAE
