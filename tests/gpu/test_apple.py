"""Apple's GPUs have no float64. What is pretended is a GPU of the name "cuda" without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.evaluation import metrics
from tests.helpers import runner_config, transcoder_config
from tests.pretend_gpu import PretendGPUs
from tests.report.conftest import CONTEXT, collected, random_sae


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPUs]:
    cpu = torch.device("cpu")
    assert metrics.float64_device(torch.device("mps", 0)) == cpu
    for module in ("evaluation.metrics", "report.collector"):
        monkeypatch.setattr(f"saelens_matryoshka.{module}.float64_device", lambda _: cpu)
    with PretendGPUs(1, float64=False) as gpus:
        yield gpus


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(3, 200, (12, CONTEXT), generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("gpu")
def test_there_is_no_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.ones(3, device="cuda").double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, device="cuda", dtype=torch.float64)


@pytest.mark.usefixtures("gpu")
def test_an_evaluation_and_samples_need_none(tiny_model: HookedTransformer, prompts: torch.Tensor) -> None:
    model, sae = copy.deepcopy(tiny_model).to("cuda"), random_sae().to("cuda")
    settings = {"n_tokens": prompts.numel(), "n_ce_tokens": 200}
    ours, theirs = (
        sm.evaluate(sae, model, prompts, **settings),
        sm.evaluate(random_sae(), tiny_model, prompts, **settings),
    )
    for row, expected in zip(ours.to_dict()["prefixes"], theirs.to_dict()["prefixes"], strict=True):
        assert row.pop("density") == expected.pop("density")
        assert row == pytest.approx(expected, rel=1e-4)
    samples, expected = collected(sae, model, prompts), collected(random_sae(), tiny_model, prompts)
    torch.testing.assert_close(samples.sums, expected.sums)


@pytest.mark.usefixtures("gpu")
def test_a_dictionary_on_the_cpu_is_trained_on_a_language_model_there(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset
) -> None:
    cfg = runner_config(transcoder_config(), llm_device="cuda", training_tokens=128 * 4)
    model = copy.deepcopy(tiny_model).to("cuda")
    trained = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=token_dataset).run()
    assert trained.W_dec.isfinite().all()


def test_training_a_dictionary_there_is_refused(
    tiny_model: HookedTransformer, token_dataset: datasets.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="device='mps': the threshold is kept in float64"):
        sm.MatryoshkaTrainingSAEConfig(d_in=8, d_sae=32, k=4, matryoshka_widths=[32], device="mps")
    cfg = runner_config(transcoder_config(), device="mps", output_path=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="device='mps': the threshold is kept in float64"):
        LanguageModelSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=token_dataset)
    assert not (tmp_path / "run").exists()
