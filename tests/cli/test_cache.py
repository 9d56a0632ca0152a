"""The cache command: write, show, verify; and train from it without a language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saelens_matryoshka.cli import app
from saelens_matryoshka.cli.cache import _count


@pytest.mark.parametrize(
    ("text", "count"),
    [("250000", 250_000), ("500k", 500_000), ("2M", 2 * 10**6), ("1e8", 10**8), ("1_000", 1000)],
)
def test_numbers_of_tokens(text: str, count: int) -> None:
    assert _count("--tokens", text) == count


@pytest.mark.parametrize("text", ["", "many", "-5", "1.5", "M"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--tokens"):
        _count("--tokens", text)


def _run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_cache_is_written_shown_verified_and_trained_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model_name", "tiny", "--context_size", "32", "--tokens", "1024", "--held-out", "128"]
    words += ["--mapping", "mlp", "--layers", "2", "--hook", "blocks.1.hook_resid_post"]
    assert "Written in" in _run("cache", "acts", *words)
    again = _run("cache", "acts", *words)
    assert "It is complete: nothing had to be written." in again
    assert "Writing" not in again
    next(Path("acts/train").glob("*.arrow")).unlink()
    assert "Written in" in _run("cache", "acts", *words)
    shown = _run("cache", "acts")
    assert "blocks.1.hook_resid_post" in shown
    assert "1,024 tokens to train on" in shown
    with pytest.raises(ValueError, match="--model_name is needed"):
        _run("cache", "acts", "--tokens", "2048")
    assert "All 2 files have the checksums" in _run("cache", "acts", "--verify")
    sizes = ["--d_sae", "64", "-k", "4", "--training_tokens", "1024", "--train_batch_size_tokens", "128"]
    printed = _run(
        "train", "--cache", "acts", "--model_name", "tiny", "--mapping", "mlp", "--layer", "2", "--name",
        "one", "--json", *sizes
    )  # fmt: skip
    metrics = json.loads(printed[printed.index("{") :].splitlines()[0])["metrics"]
    assert 0 < metrics["prefixes"][-1]["fvu"] < 1.5
    assert metrics["prefixes"][-1]["ce"] is None
    runner_cfg = json.loads(Path("results/tiny/mlp-2/one/runner_cfg.json").read_text())
    assert runner_cfg["cached_activations_path"] == "acts"
    assert runner_cfg["context_size"] == 32
    with pytest.raises(ValueError, match="'blocks.3.ln2.hook_normalized' is not in the cache acts"):
        _run("train", "--cache", "acts", "--model_name", "tiny", "--mapping", "mlp", "--layer", "3", *sizes)


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no activation cache"):
        _run("cache", str(tmp_path))
