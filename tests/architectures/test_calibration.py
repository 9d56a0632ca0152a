"""The saved threshold keeps k latents per token, on text the training has not seen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.architectures.calibration import RecentRows, threshold_for_l0
from tests.helpers import runner_config, transcoder_config


def _sae_config() -> sm.MatryoshkaTrainingSAEConfig:
    return sm.MatryoshkaTrainingSAEConfig(
        d_in=128, d_sae=256, k=16, matryoshka_widths=[64, 256], threshold_calibration="l0"
    )


def _mixed_text() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Held-out and training text of one distribution: the files differ too much, so pieces of them."""
    files = tiny.text.dataset("train")["text"]
    pieces = [{"text": file[i : i + 400]} for file in files for i in range(0, len(file), 400)]
    random.Random(0).shuffle(pieces)
    return datasets.Dataset.from_list(pieces[:1500]), datasets.Dataset.from_list(pieces[1500:])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scaling"), [("transcoder", "expected_average_only_in"), ("sae", "none")])
def test_inference_l0_on_held_out_text_is_within_two_percent_of_k(
    kind: str, scaling: str, tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    held_out, train = _mixed_text()
    sae: Any = transcoder_config(k=16) if kind == "transcoder" else _sae_config()
    sae.normalize_activations = scaling
    hook = "blocks.2.ln2.hook_normalized" if kind == "transcoder" else "blocks.2.hook_resid_post"
    cfg = runner_config(
        sae,
        hook_name=hook,
        training_tokens=80_000,
        train_batch_size_tokens=1024,
        store_batch_size_prompts=8,
        n_batches_in_buffer=32,
        context_size=128,
        n_batches_for_norm_estimate=4,
        lr=3e-3,
        lr_decay_steps=20,
        output_path=str(tmp_path),
    )
    LanguageModelSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=train).run()
    result = sm.evaluate(SAE.load_from_disk(tmp_path), tiny_model, held_out, n_tokens=80_000, n_ce_tokens=0)
    assert result.train_l0 == 16
    assert result.prefixes[-1].l0 == pytest.approx(16, rel=0.02)


def test_recent_rows_are_those_of_the_last_batches() -> None:
    recent = RecentRows()
    for batch in range(300):
        recent.add(torch.full((1024, 2), float(batch)))
    rows = recent.rows()
    assert len(rows) == recent.count() == 16_384
    assert rows[:, 0].unique().tolist() == list(range(300 - 128, 300))


@pytest.mark.parametrize("guess", [0.0, 0.5, 100.0])
def test_threshold_keeps_exactly_k_scores_per_row(guess: float) -> None:
    rows, W_enc, b_enc = torch.randn(200, 8), torch.randn(8, 32), torch.randn(32)
    norms = torch.rand(32) + 0.5
    threshold = threshold_for_l0(rows, W_enc, b_enc, norms, 3.5, guess)
    scores = (rows @ W_enc + b_enc) * norms
    assert int((scores > threshold).sum()) == 700
