from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ground_truth, synthetic
from benchmarks.ground_truth import at_l0
from benchmarks.synthetic import sae_world, transcoder_world
from saelens_matryoshka.evaluation.ground_truth import TrueBatch
from tests.helpers import run_steps, sparse_batches, trainer_for


def _fires(batches: list[TrueBatch]) -> torch.Tensor:
    return torch.cat([batch.features for batch in batches]) > 0


def test_children_fire_with_their_parent_and_without_their_siblings() -> None:
    world = sae_world(0, 1024, n_roots=3, n_free=8, d=16)
    fires = _fires(world.held_out)
    assert len(world.children) == 3 + 9
    for parent, children in world.children.items():
        assert not (fires[:, children].any(dim=1) & ~fires[:, parent]).any()
        assert (fires[:, children].sum(dim=1) <= 1).all()
    assert fires[:, world.groups["children"]].any()
    assert (fires[:, list(world.groups["roots"])] & ~fires[:, world.groups["children"][::3]]).any()
    members = sorted(feature for group in world.groups.values() for feature in group)
    assert members == list(range(len(world.directions)))


def test_a_transcoders_target_is_the_sum_of_its_terms() -> None:
    world = transcoder_world(0, 1024, n_per_kind=4, n_gates=2, d=16)
    for batch in world.held_out[:3]:
        rest = batch.target - batch.features @ world.directions
        torch.testing.assert_close(rest, rest[:1].expand_as(rest))  # the bias
    assert world.train.shape == (1024, 32)


def test_gated_terms_fire_less_often_than_copies() -> None:
    world = transcoder_world(0, 1024, n_per_kind=4, n_gates=2, d=16)
    rates = _fires(world.held_out).float().mean(dim=0)
    copies, conjunctions, inhibitions = (
        rates[world.groups[name]].mean() for name in ("copies", "conjunctions", "inhibitions")
    )
    assert conjunctions < inhibitions < copies


@pytest.mark.parametrize("make", [sae_world, transcoder_world])
def test_a_seed_determines_its_world(make) -> None:
    sizes = {"n_roots": 2, "n_free": 4} if make is sae_world else {"n_per_kind": 2, "n_gates": 2}
    first, again, other = (make(seed, 1024, d=8, **sizes) for seed in (1, 1, 2))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)


def test_thresholds_are_scaled_to_the_l0_asked_for() -> None:
    import saelens_matryoshka as sm

    sae = sm.MatryoshkaTrainingSAE(
        sm.MatryoshkaTrainingSAEConfig.recommended(d_in=16, d_sae=64, k=4, rescale_acts_by_decoder_norm=False)
    )
    batches = sparse_batches(20, 256, 16)
    run_steps(trainer_for(sae, batches), batches)
    for l0 in (3.0, 6.5):
        model = at_l0(sae, batches[0], l0)
        assert (model.encode(batches[0]) > 0).float().sum(dim=1).mean() == pytest.approx(l0, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sae", "transcoder"])
def test_the_benchmark_runs(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "_HELD_OUT_BATCHES", 3)
    monkeypatch.setattr(ground_truth, "_CALIBRATION_BATCHES", 1)
    figures, tables = tmp_path / "figures.json", tmp_path / "tables.md"
    arguments = [
        "--lr",
        "1e-3",
        "--quick",
        "--steps",
        "3",
        "--d-sae",
        "64",
        "--task",
        task,
        "--only",
        "recommended",
        "stock b",
        "one",
    ]
    monkeypatch.setattr(
        sys, "argv", ["ground_truth", *arguments, "--json", str(figures), "--markdown", str(tables)]
    )
    ground_truth.main()
    written = json.loads(figures.read_text())
    names = {row["contestant"] for row in written["rows"]}
    assert names == set(written["sweeps"])
    assert len(written["rows"]) == 2 * len(names)
    for name in names:
        assert name in tables.read_text()
    assert "where found features land" in capsys.readouterr().out


def test_tuning_on_a_reported_seed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ground_truth", "--tuning-seed", "1"])
    with pytest.raises(SystemExit):
        ground_truth.main()
    assert "tune on another" in capsys.readouterr().err
