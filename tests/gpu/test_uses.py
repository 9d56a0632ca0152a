"""What else is done with a dictionary on a GPU gives there what it gives on the CPU."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, LanguageModelSAETrainingRunner
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.cache import CachedModel, open_cache, write_cache
from saelens_matryoshka.cli import main
from saelens_matryoshka.formats import Folder, build, converter, from_saelens, load
from saelens_matryoshka.formats.registry import FORMATS
from saelens_matryoshka.layers import lockstep, train_layers
from saelens_matryoshka.report.decoder import decoder_relations
from saelens_matryoshka.report.logits import logit_effects
from saelens_matryoshka.runner import prepare_trainer
from saelens_matryoshka.runs.estimate import estimate
from tests.cache.helpers import SOURCE, TARGET
from tests.cache.helpers import settings as cache_settings
from tests.formats.coders import assert_same, random_coder
from tests.helpers import run_steps, runner_config, sparse_batches, trainer_for, transcoder_config
from tests.pretend_gpu import PretendGPUs
from tests.report.conftest import CONTEXT, collected, random_sae

pytestmark = pytest.mark.usefixtures("gpus")
GPU = torch.device("cuda", 0)


@pytest.fixture
def model(tiny_model: HookedTransformer) -> HookedTransformer:
    """The embedded model on the first GPU."""
    return copy.deepcopy(tiny_model).to("cuda", print_details=False)


@pytest.fixture
def sae() -> JumpReLUSAE:
    return random_sae().to("cuda")


@pytest.fixture
def prompts() -> torch.Tensor:
    tokens = torch.randint(3, 4000, (24, CONTEXT), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    return tokens


def _assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- training


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:1", "cuda:0")])
def test_a_dictionary_that_is_moved_works_and_trains_on(first: str, then: str, rescale: bool) -> None:
    cfg = sm.MatryoshkaTrainingSAEConfig(
        d_in=16,
        d_sae=64,
        k=4,
        matryoshka_widths=[16, 64],
        threshold_calibration="l0",
        rescale_acts_by_decoder_norm=rescale,
        device=first,
    )
    batches = sparse_batches(4, 64, 16)
    moved = sm.MatryoshkaTrainingSAE(cfg)
    stayed = copy.deepcopy(moved).to("cpu")

    def train(sae: Any, device: str) -> None:
        trainer = trainer_for(sae, [batch.to(device) for batch in batches], device=device)
        prepare_trainer(trainer)
        run_steps(trainer, [batch.to(device) for batch in batches])

    for sae, device in ((moved, first), (stayed, "cpu")):
        train(sae, device)
    moved.to(then)
    _assert_close(moved.encode(batches[0].to(then)).cpu(), stayed.encode(batches[0]))
    for sae, device in ((moved, then), (stayed, "cpu")):
        train(sae, device)
    for name, theirs in stayed.state_dict().items():
        _assert_close(moved.state_dict()[name].cpu(), theirs)


@pytest.mark.parametrize("name", ["W_enc", "b_dec"])
def test_a_bad_gradient_is_kept_out_of_the_weights_without_waiting(name: str, gpus: PretendGPUs) -> None:
    cfg = sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=64, k=4, matryoshka_widths=[16, 64], device="cuda")
    batches = [batch.cuda() for batch in sparse_batches(5, 64, 16)]
    trainer = trainer_for(sm.MatryoshkaTrainingSAE(cfg), batches, device="cuda")
    prepare_trainer(trainer)
    parameter = getattr(trainer.sae, name)
    trainer.step(batches[0])
    before = [p.detach().clone() for p in trainer.sae.parameters()]
    hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
    with gpus.waiting() as waits:
        trainer.step(batches[1])
    assert len([wait for wait in waits if "finite.py" in wait.where]) == 1, "for the loss of this step"
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.sae.parameters(), strict=True))
    hook.remove()
    with pytest.raises(sm.NonFiniteActivationsError, match="the gradient holds NaN"):
        trainer.step(batches[2])


def test_layers_train_in_lockstep(
    tiny_model: HookedTransformer, model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    def trained(model: Any, **devices: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        cfgs = {
            str(layer): runner_config(
                transcoder_config(
                    hook_name_out=f"blocks.{layer}.hook_mlp_out", device=devices.get("device", "cpu")
                ),
                hook_name=f"blocks.{layer}.ln2.hook_normalized",
                training_tokens=128 * 4,
                **devices,
            )
            for layer in (0, 2)
        }
        runners = train_layers(cfgs, override_model=model, override_dataset=token_dataset)
        return {
            f"{name} {key}": value
            for name, runner in runners.items()
            for key, value in runner.sae.state_dict().items()
        }

    on_gpus = trained(model, device="cuda:1", llm_device="cuda:0", act_store_device="cpu")
    assert {str(tensor.device) for tensor in on_gpus.values()} == {"cuda:1"}
    _assert_close({name: tensor.cpu() for name, tensor in on_gpus.items()}, trained(tiny_model))


def test_each_of_several_dictionaries_starts_from_the_same_random_state_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu, started_from = {"state": torch.tensor([5])}, []  # of a generator that counts

    def draw(*_: Any) -> None:
        started_from.append(on_gpu["state"].item())
        on_gpu["state"] = on_gpu["state"] + 1

    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [on_gpu["state"]])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: on_gpu.update(state=state))
    monkeypatch.setattr(lockstep, "PartRunner", draw)
    cfgs = {name: runner_config(transcoder_config(device="cuda"), device="cuda") for name in "abc"}
    lockstep._runners(cfgs, None, dict.fromkeys(cfgs))
    assert started_from == [5, 5, 5]
    assert on_gpu["state"].item() == 6, "as after the first"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cache_is_written_and_trained_from(
    dtype: str,
    tiny_model: HookedTransformer,
    model: HookedTransformer,
    token_dataset: datasets.Dataset,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cache"
    for name, written_by in ((folder, model), (tmp_path / "on the CPU", tiny_model)):
        write_cache(name, written_by, cache_settings(dtype=dtype), token_dataset, progress=False)
    how = {"seed": 0, "dtype": torch.float32}
    ours = next(open_cache(folder).batches([SOURCE, TARGET], 64, device="cuda", **how))
    theirs = next(open_cache(tmp_path / "on the CPU").batches([SOURCE, TARGET], 64, **how))
    assert {rows.device for rows in ours.values()} == {GPU}
    _assert_close({hook: rows.cpu() for hook, rows in ours.items()}, theirs)
    cfg = runner_config(
        transcoder_config(device="cuda"),
        device="cuda",
        use_cached_activations=True,
        cached_activations_path=str(folder),
        training_tokens=128 * 4,
    )
    trained = LanguageModelSAETrainingRunner(cfg, override_model=CachedModel(open_cache(folder))).run()
    assert trained.W_dec.device == GPU
    assert trained.W_dec.isfinite().all()


# ---- measuring


def test_an_evaluation_gives_the_same_numbers(
    tiny_model: HookedTransformer, model: HookedTransformer, sae: JumpReLUSAE, prompts: torch.Tensor
) -> None:
    settings = {"n_tokens": prompts.numel(), "n_ce_tokens": 200}
    ours = sm.evaluate(sae, model, prompts, **settings).to_dict()
    theirs = sm.evaluate(random_sae(), tiny_model, prompts, **settings).to_dict()
    for name in ("n_tokens", "n_ce_tokens", "ce_clean", "ce_zero", "ce_mean"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for row, expected in zip(ours["prefixes"], theirs["prefixes"], strict=True):
        assert row.pop("density") == expected.pop("density")
        assert row == pytest.approx(expected, rel=1e-4)
    elsewhere = sm.evaluate(sae.to("cuda:1"), model, prompts, **settings).to_dict()
    assert elsewhere["ce_clean"] == pytest.approx(theirs["ce_clean"], rel=1e-4)
    compared = sm.compare({"one": sae, "other": random_sae()}, model, prompts, **settings)
    assert json.loads(compared.to_json())


@pytest.mark.parametrize("command", ["eval", "samples", "report"])
def test_commands_take_the_gpu_and_print_what_they_are_asked_for(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_sae().save_model(tmp_path / "sae")
    monkeypatch.chdir(tmp_path)
    arguments = {"eval": ["--tokens", "300", "--ce-tokens", "100"]}.get(command, ["--tokens", "400"])
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", command, "sae", *arguments, "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert not stopped.value.code, said.err
    assert json.loads(said.out)
    assert "Moving model" not in said.err


def test_samples_are_the_same(
    tiny_model: HookedTransformer, model: HookedTransformer, sae: JumpReLUSAE, prompts: torch.Tensor
) -> None:
    ours, theirs = collected(sae, model, prompts), collected(random_sae(), tiny_model, prompts)
    assert torch.equal(ours.fired, theirs.fired)
    _assert_close(ours.largest, theirs.largest)
    for latent in range(3):
        for found, expected in zip(ours.top_of(latent), theirs.top_of(latent), strict=True):
            assert found.tokens == expected.tokens
    _assert_close(logit_effects(sae, model).top_values, logit_effects(random_sae(), tiny_model).top_values)
    relations = decoder_relations(sae.W_dec, [16, 48, 96])
    _assert_close(relations.mean_cosine, decoder_relations(random_sae().W_dec, [16, 48, 96]).mean_cosine)


def test_an_estimate_is_made_for_both_devices() -> None:
    cfg = runner_config(transcoder_config(), device="cuda", llm_device="cuda:1", autocast=True)
    found = estimate(cfg)
    assert {device.name for device in found.devices} == {"cpu", "cuda:0", "cuda:1"}
    assert all(device.fits for device in found.devices)
    assert found.time is not None


# ---- files


def test_what_was_saved_is_loaded_onto_a_gpu(sae: JumpReLUSAE, tmp_path: Path) -> None:
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, device="cuda:1")
    assert {str(tensor.device) for tensor in loaded.state_dict().values()} == {"cuda:1"}
    assert torch.equal(loaded.W_dec.cpu(), random_sae().W_dec)
    small = sm.truncate(loaded, 48)
    x = torch.randn(5, 128, device="cuda:1")
    acts = loaded.encode(x)
    _assert_close(sm.decode_prefixes(loaded, acts)[1], small(x))
    assert {str(tensor.device) for tensor in small.state_dict().values()} == {"cuda:1"}
    assert str(small.cfg.device) == str(small.device) == "cuda:1"


@pytest.mark.parametrize("format", ["circuit-tracer", "sparsify", "dictionary-learning"])
def test_a_format_is_read_onto_a_gpu_and_written_from_there(format: str, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "circuit-tracer": {},
        "sparsify": {
            "activation": "relu",
            "hook_name": "blocks.0.mlp.hook_in",
            "hook_name_out": "blocks.0.mlp.hook_out",
            "input_frame": None,
        },
        "dictionary-learning": {"transcoder": False, "uniform": True},
    }
    item = {"circuit-tracer": "layer_0.safetensors", "sparsify": "layers.0.mlp", "dictionary-learning": "."}
    coder = random_coder(**kinds[format]).with_metadata()
    (tmp_path / "out").mkdir()
    on_gpu = build(coder, device="cuda")
    assert on_gpu.W_dec.device == GPU
    FORMATS[format].save([from_saelens(on_gpu)], tmp_path / "out")
    assert_same(load(Folder(tmp_path / "out"), item[format], format), coder)
    sae = SAE.load_from_disk(tmp_path / "out" / item[format], device="cuda", converter=converter(format))
    assert sae.W_dec.device == GPU
    assert sae(torch.randn(3, 16, device="cuda")).device == GPU
