"""SAELens's runner trains on pretended GPUs what it trains on the CPU."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from tests.helpers import runner_config, transcoder_config
from tests.pretend_gpu import PretendGPUs

Run = Callable[..., dict[str, torch.Tensor]]

SKIP = {"d_in": 128, "d_sae": 256, "k": 8, "matryoshka_widths": [32, 256]}
SCALED = {"normalize_activations": "expected_average_only_in", "aux_loss_coefficient": 1 / 32}


def _config(kind: str, device: str = "cpu", **settings: Any) -> Any:
    shared = {"training_tokens": 128 * 5, "n_batches_for_norm_estimate": 2, "dead_feature_window": 1}
    if kind == "sae":
        sae: Any = sm.MatryoshkaTrainingSAEConfig(**SKIP, device=device)
        shared["hook_name"] = "blocks.1.hook_resid_post"
    elif kind == "transcoder":
        sae = transcoder_config(device=device, **SCALED)
    else:
        sae = sm.MatryoshkaTrainingSkipTranscoderConfig(
            **SKIP, hook_name_out="blocks.2.hook_mlp_out", input_gain="norm_weight", device=device
        )
    return runner_config(sae, device=device, **{**shared, **settings})


@pytest.fixture
def train(tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path) -> Run:
    """Train, save, and give what plain SAELens loads, on the CPU."""

    def run(kind: str, device: str = "cpu", **settings: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        cfg = _config(kind, device, output_path=str(folder), **settings)
        model = copy.deepcopy(tiny_model).to(cfg.llm_device or device)
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=token_dataset)
        trained = runner.run()
        assert {parameter.device.type for parameter in trained.parameters()} == {device.partition(":")[0]}
        return dict(SAE.load_from_disk(folder).state_dict())

    return run


def _assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


PLACES = {
    "one GPU": {"device": "cuda"},
    "two GPUs": {"device": "cuda:0", "llm_device": "cuda:1"},
    "second GPU": {"device": "cuda:1", "act_store_device": "cuda:0", "llm_device": "cuda:1"},
    "language model on the CPU": {"device": "cuda", "llm_device": "cpu"},
    "buffer on the CPU": {"device": "cuda", "act_store_device": "cpu"},
    "prefetching": {"device": "cuda", "prefetch_llm_batches": 2},
}


@pytest.mark.parametrize("kind", ["sae", "skip transcoder"])
def test_every_architecture_trains_as_on_the_cpu(kind: str, train: Run) -> None:
    expected = train(kind)
    with PretendGPUs():
        _assert_close(train(kind, "cuda"), expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_transcoder_trains_as_on_the_cpu(place: str, train: Run) -> None:
    expected = train("transcoder")
    with PretendGPUs():
        _assert_close(train("transcoder", **PLACES[place]), expected)


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"autocast": True, "autocast_lm": True}], ids=str
)
def test_low_precision_trains(settings: dict[str, Any], train: Run) -> None:
    with PretendGPUs():
        assert all(tensor.isfinite().all() for tensor in train("sae", "cuda", **settings).values())


@pytest.mark.parametrize("resume_on", ["cuda", "cuda:1", "cpu"])
def test_a_run_goes_on_from_its_checkpoint(resume_on: str, train: Run, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with PretendGPUs():
        expected = train("transcoder", "cuda", checkpoint_path=str(checkpoints), n_checkpoints=1)
    (checkpoint,) = checkpoints.glob("*/*")
    resume = functools.partial(train, "transcoder", resume_on, resume_from_checkpoint=str(checkpoint))
    with PretendGPUs() if resume_on != "cpu" else contextlib.nullcontext():
        _assert_close(resume(), expected)
