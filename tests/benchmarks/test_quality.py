"""The quality benchmark's pure parts: same tokens for all, peers rebuilt with parity, ratios and aims."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelens_matryoshka as sm
from benchmarks.quality import contestants, peers, report
from benchmarks.quality.__main__ import main
from benchmarks.quality.activations import Activations, Hooks, collect
from benchmarks.quality.contestants import Sizes
from benchmarks.quality.measure import Row
from benchmarks.quality.training import train
from saelens_matryoshka import tiny
from saelens_matryoshka.prefixes import inference_model

SIZES = Sizes(d=128, k=4, widths=(16, 64))


@pytest.fixture(scope="module")
def activations(tiny_model) -> Activations:
    return collect(
        tiny_model,
        2,
        tiny.text.dataset("train").select(range(20)),
        tiny.text.dataset("held_out").select(range(5)),
        n_tokens=1280,
        n_validation=256,
        n_held_out=256,
        context_size=64,
        batch_size_prompts=4,
    )


# ---- the same tokens


def test_every_task_and_every_peer_sees_the_same_tokens_in_the_same_order(activations, tmp_path):
    activations.save(tmp_path / "rows.safetensors")
    written = load_file(tmp_path / "rows.safetensors")
    pairs = torch.cat(list(activations.batches("transcoder", 128)))
    assert torch.equal(torch.cat(list(activations.batches("sae", 128))), written["residual"])
    assert torch.equal(torch.cat(list(activations.batches("skip_transcoder", 128))), pairs)
    assert torch.equal(pairs, torch.cat([written["source"], written["target"]], dim=-1))


def test_rows_stay_aligned_source_target_and_residual_of_one_token(activations, tiny_model):
    """The model's own MLP maps every source row to its target row."""
    block = tiny_model.blocks[2]
    expected = block.ln2_post(block.mlp(activations.source[None]))[0]
    torch.testing.assert_close(expected, activations.target, rtol=1e-3, atol=1e-3)
    # what the block adds is in the residual behind it: it cannot be told from another token's otherwise
    own = (activations.residual - activations.target).norm(dim=-1).mean()
    other = (activations.residual - activations.target.roll(1, 0)).norm(dim=-1).mean()
    assert own < other


def test_the_validation_prompts_are_not_trained_on(activations, tiny_model):
    site = activations.hooks.residual.hook_name
    _, cache = tiny_model.run_with_cache(activations.validation, names_filter=[site])
    rows = cache[site].flatten(0, 1)
    assert torch.cdist(rows, activations.residual).min(dim=1).values[1:].median() > 1e-3


def test_too_little_text_is_refused_by_name(tiny_model):
    text = tiny.text.dataset("train").select(range(2))
    with pytest.raises(ValueError, match="tokens=10000000"):
        collect(tiny_model, 2, text, text, n_tokens=10**7, n_validation=64, n_held_out=64, context_size=64)


# ---- contestants


@pytest.mark.parametrize("task", contestants.TASKS)
def test_what_is_measured_reads_the_raw_hook_as_training_read_the_cached_rows(task, activations):
    trained = train(contestants.nested(task, SIZES, activations.hooks), activations, batch_size=128, seed=0)
    measured = inference_model(trained)
    rows = activations.residual if task == "sae" else activations.source
    gain = activations.hooks.source.gain
    raw = rows if task == "sae" else rows / gain
    same = torch.isclose(measured(raw), trained(rows), rtol=1e-3, atol=1e-3).all(dim=-1)
    assert same.float().mean() > 0.98  # rounding moves a few activations across the threshold
    assert sm.matryoshka_widths(measured) == [16, 64]


def test_training_leaves_the_contestant_as_it_was(activations):
    contestant = contestants.nested("transcoder", SIZES, activations.hooks)
    contestant.config.normalize_activations = "expected_average_only_in"
    before = contestant.config.to_dict()
    first = train(contestant, activations, batch_size=128, seed=0)
    assert contestant.config.to_dict() == before
    again = train(contestant, activations, batch_size=128, seed=0)
    torch.testing.assert_close(first.W_dec, again.W_dec)


def test_a_rival_differs_from_ours_in_widths_and_k_alone(activations):
    ours = contestants.nested("transcoder", SIZES, activations.hooks).config.to_dict()
    rival = contestants.rival("transcoder", SIZES, activations.hooks, 16, 2.5).config.to_dict()
    differing = {key for key in ours if ours[key] != rival[key]}
    assert differing <= {"d_sae", "k", "matryoshka_widths", "level_weights", "metadata"}
    assert (rival["d_sae"], rival["k"], rival["matryoshka_widths"]) == (16, 2.5, [16])


# ---- peers


def _sparsify_weights(skip: bool) -> dict[str, torch.Tensor]:
    weights = {
        "encoder.weight": torch.randn(32, 8),
        "encoder.bias": torch.randn(32),
        "W_dec": torch.randn(32, 8),
        "b_dec": torch.randn(8),
    }
    return {**weights, "W_skip": torch.randn(8, 8)} if skip else weights


def _sparsify_forward(weights: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> torch.Tensor:
    """Row by row, as sparsify's documentation describes it."""
    rows = []
    for row in x:
        pre = (weights["encoder.weight"] @ row + weights["encoder.bias"]).relu()
        out = weights["b_dec"].clone()
        for index in pre.argsort(descending=True)[:k]:
            out += pre[index] * weights["W_dec"][index]
        rows.append(out + weights["W_skip"] @ row if "W_skip" in weights else out)
    return torch.stack(rows)


def _hooks(gain: torch.Tensor | None, offset: torch.Tensor | None) -> Hooks:
    return Hooks(sm.Site("in", gain, offset), sm.Site("out"), sm.Site("resid"), "normalized")


def _saved_job(folder: Path, skip: bool, error: float = 0.0) -> tuple[peers.Job, torch.Tensor, torch.Tensor]:
    """A job of sparsify as its script leaves it; source rows, and its own predictions of them."""
    task = "skip_transcoder" if skip else "transcoder"
    job = peers.Job("sparsify", "job", "label", task, 0, 3, [32], False, 32, {})
    weights, source = _sparsify_weights(skip), torch.randn(20, 8)
    predictions = _sparsify_forward(weights, source, job.k)
    (folder / "sparsify" / "job" / "mlp").mkdir(parents=True)
    save_file(weights, folder / "sparsify" / "job" / "mlp" / "sae.safetensors")
    save_file({"predictions": predictions + error}, folder / "sparsify" / "job" / "predictions.safetensors")
    save_file({"source": source}, folder / "check.safetensors")
    return job, source, predictions


@pytest.mark.parametrize("skip", [False, True])
def test_a_sparsify_transcoder_reloads_with_parity_and_reads_the_raw_hook(skip, tmp_path):
    job, source, predictions = _saved_job(tmp_path, skip)
    gain, offset = torch.rand(8) + 0.5, torch.randn(8)
    sae = peers.load(job, _hooks(gain, offset), tmp_path)
    torch.testing.assert_close(sae((source - offset) / gain), predictions, rtol=1e-4, atol=1e-4)
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out) == ("in", "out")


def test_a_peer_that_does_not_reload_with_parity_is_refused(tmp_path):
    job, _, _ = _saved_job(tmp_path, skip=False, error=0.1)
    with pytest.raises(ValueError, match="differs from its own forward pass"):
        peers.load(job, _hooks(None, None), tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_learning_sae_predicts_as_its_formula(nested):
    W_enc, b_enc, W_dec, b_dec = torch.randn(8, 32), torch.randn(32), torch.randn(32, 8), torch.randn(8)
    weights = {"b_dec": b_dec, "threshold": torch.tensor(0.7), "k": torch.tensor(3)}
    if nested:
        weights |= {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "group_sizes": torch.tensor([8, 24])}
    else:
        weights |= {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "decoder.weight": W_dec.T}
    sae, x = peers.dictionary_learning_sae(weights), torch.randn(20, 8)
    acts = ((x - b_dec) @ W_enc + b_enc).relu()
    torch.testing.assert_close(sae(x), (acts * (acts > 0.7)) @ W_dec + b_dec, rtol=1e-4, atol=1e-5)
    assert sm.matryoshka_widths(sae) == ([8, 32] if nested else [32])


def test_every_peer_job_has_a_folder_of_its_own_and_the_common_sizes():
    jobs = list(peers.jobs(list(contestants.TASKS), SIZES, 1000, 32, [0, 1]))
    assert len({(job.peer, job.name) for job in jobs}) == len(jobs)
    assert {job.widths[-1] for job in jobs} == {SIZES.d_sae}
    assert {job.k for job in jobs} == {SIZES.k}
    defaults = [job for job in jobs if job.label.endswith("defaults")]
    assert all(job.settings == {} for job in defaults)


def test_a_failing_session_says_so_with_the_end_of_its_log(activations, tmp_path, monkeypatch):
    monkeypatch.setattr(peers.sys, "executable", "false")
    (job, *_) = peers.jobs(["transcoder"], SIZES, 40, 32, [0])
    with pytest.raises(RuntimeError, match=r"quality_sparsify failed.*sparsify\.log"):
        peers.train(activations, [job], tmp_path)


# ---- the report


def _row(contestant: str, width: int, fvu: float, seed: int = 0, rival_of: str | None = None) -> Row:
    return Row("transcoder", contestant, width, seed, "lr 1", 4.0, fvu, 0.02, None, None, rival_of)


def test_a_prefix_is_compared_with_the_rival_of_its_width_and_seed():
    rows = [
        _row("matryoshka_transcoder", 16, 0.6),
        _row("matryoshka_transcoder", 64, 0.3),
        _row("rival", 16, 0.5, rival_of="matryoshka_transcoder"),
        _row("rival", 64, 0.3, rival_of="matryoshka_transcoder"),
    ]
    rows += [replace(row, seed=1, fvu=2 * row.fvu if row.rival_of is None else row.fvu) for row in rows]
    ratios = {line.width: line.vs_rival for line in report.lines(rows) if line.vs_rival is not None}
    assert ratios[16].values == pytest.approx((1.2, 2.4))
    assert ratios[64].values == pytest.approx((1.0, 2.0))


@pytest.mark.parametrize(("peer_fvu", "met"), [(0.31, True), (0.29, False)])
def test_the_full_width_is_held_against_each_peer(peer_fvu, met):
    rows = [
        _row("matryoshka_transcoder", 64, 0.3),
        _row("rival", 64, 0.3, rival_of="matryoshka_transcoder"),
        _row("sparsify TopK, tuned", 64, peer_fvu),
    ]
    aims = {aim.what: aim for aim in report.aims(report.lines(rows))}
    aim = aims["FVU, full width / sparsify TopK, tuned"]
    assert aim.met == met
    assert aim.value.mean == pytest.approx(0.3 / peer_fvu)


def test_the_markdown_has_a_row_per_prefix():
    rows = [_row("matryoshka_transcoder", width, 0.5) for width in (16, 64)]
    table = report.markdown(report.lines(rows))
    assert [line for line in table.splitlines() if line.startswith("| matryoshka")] == [
        f"| matryoshka_transcoder | {width} | 4.0 | 0.5000 |  | 2.0% |  |  | lr 1 |" for width in (16, 64)
    ]


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [_row("matryoshka_transcoder", width, fvu) for width, fvu in itertools.product((16, 64), (0.5,))]
    report.plot(report.lines(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- the whole


@pytest.mark.slow
def test_the_command_writes_a_row_per_prefix_and_rival(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = {"d-sae": 64, "k": 4, "batch": 64, "tokens": 1280, "held-out-tokens": 256}
    sizes |= {"validation-tokens": 256, "ce-tokens": 256}
    flags = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    main([*flags, "--tasks", "transcoder", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "quality.json").read_text())
    rows = {(row["contestant"], row["width"]) for row in result["rows"]}
    widths = (4, 16, 32, 64)
    expected = itertools.product(("matryoshka_transcoder", "BatchTopK of this width"), widths)
    assert rows == {*expected, ("per-token TopK", 64)}
    assert len([aim for aim in result["aims"] if "rival" in aim["what"]]) == len(widths)
    assert (tmp_path / "quality.md").read_text().count("| matryoshka_transcoder |") == len(widths)


def test_a_model_without_its_text_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "gpt2"])
    assert "--model and --dataset go together" in capsys.readouterr().err
