from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saelens_matryoshka.cli import app
from saelens_matryoshka.cli.saebench import _settings
from tests.forked import run_command

HAS_SAE_BENCH = importlib.util.find_spec("sae_bench") is not None


@pytest.mark.skipif(HAS_SAE_BENCH, reason="SAEBench is installed")
def test_without_sae_bench_it_says_what_to_install(tmp_path: Path) -> None:
    done = run_command("saebench", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install --no-deps sae-bench==0.6.0" in done.stderr
    assert '--editable ".[saebench]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_evals(tmp_path: Path) -> None:
    done = run_command("saebench", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "sparse_probing" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_settings_are_read_as_yaml_by_eval() -> None:
    given = ["scr.n_values=[2, 10]", "scr.early_stopping_patience=5", "core.dataset=a/b"]
    assert _settings(given) == {
        "scr": {"n_values": [2, 10], "early_stopping_patience": 5},
        "core": {"dataset": "a/b"},
    }


@pytest.mark.parametrize(
    ("setting", "says"),
    [("scr.n_values=[2", "the value is not YAML"), ("n_values=2", "expected EVAL.NAME=VALUE")],
)
def test_what_is_no_setting_is_refused(setting: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"--set .*{says}"):
        _settings([setting])


@pytest.mark.parametrize("option", ["--latents", "--prices"])
def test_an_empty_list_of_numbers_is_not_passed_over(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelens_matryoshka.saebench.requirements.require_sae_bench", lambda: None)
    found = CliRunner().invoke(app, ["describe", "nowhere", "--chat-model", "any", option, ""])
    assert isinstance(found.exception, ValueError)
    assert f"{option} '': expected numbers" in str(found.exception)
