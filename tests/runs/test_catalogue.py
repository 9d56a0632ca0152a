from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from saelens_matryoshka.runs.catalogue import find_runs, runs_table
from saelens_matryoshka.runs.lock import locked


def _run(root: Path, place: str, *, done: bool = True, step: int = 10, **config: Any) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    settings = {
        "model_name": "gpt2",
        "architecture": "matryoshka_transcoder",
        "d_sae": 12288,
        "k": 64.0,
        "training_tokens": 20_000,
        "started_at": "2026-01-01T00:00:00+00:00",
        **({"completed_at": "2026-01-01T01:00:00+00:00"} if done else {}),
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    line = {
        "step": step,
        "tokens": step * 1000,
        "fvu_per_prefix": {"768": 0.5, "12288": 0.25},
        "l0": 64.0,
        "dead": 0.5,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 11, "tok')
    if done:
        row = {"fvu": 0.3, "l0": 61.0, "dead_fraction": 0.1, "ce_recovered": 0.9, "kl": 0.1}
        rows = [{**row, "width": 768, "fvu": 0.6}, {**row, "width": 12288}]
        (folder / "metrics.json").write_text(json.dumps({"prefixes": rows}))
    return folder


def _shown(root: Path, **options: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=80).print(runs_table(find_runs(root), **options))
    return text.getvalue()


def test_runs_are_found_with_their_state_and_numbers(tmp_path: Path) -> None:
    _run(tmp_path, "gpt2/mlp-8/12288-k64-20260101-000000", step=20)
    _run(tmp_path, "gpt2/mlp-8/stopped", done=False, started_at="2026-01-02T00:00:00+00:00")
    live = _run(tmp_path, "gpt2/mlp-9/live", done=False)
    (tmp_path / "gpt2/mlp-8/stopped/wandb/files").mkdir(parents=True)
    (tmp_path / "gpt2/mlp-8/stopped/wandb/files/config.yaml").write_text("started_at: 1\n")
    (tmp_path / "gpt2/mlp-8/damaged").mkdir()
    (tmp_path / "gpt2/mlp-8/damaged/config.yaml").write_text("a: [b")
    with locked(live):
        done, stopped, running = find_runs(tmp_path)
        shown = _shown(tmp_path)
    assert [run.status for run in (done, stopped, running)] == ["done", "interrupted", "running"]
    assert (done.tokens, done.evaluated, done.prefixes[-1]["ce_recovered"]) == (20_000, True, 0.9)
    assert (stopped.tokens, stopped.evaluated, stopped.prefixes[-1]["fvu"]) == (10_000, False, 0.25)
    assert stopped.prefixes[-1]["ce_recovered"] is None
    assert max(map(len, shown.splitlines())) <= 80
    for word in (
        "gpt2 · mlp-8",
        "gpt2 · mlp-9",
        "12288-k64-20260101-000000",
        "done",
        "10k/20k",
        "~0.250",
        "90.0%",
        "CE rec.",
        "zero",
    ):
        assert word in shown, shown
    assert "interrupted" in _shown(tmp_path / "gpt2" / "mlp-9")  # the lock went with its holder


def test_an_interrupted_run_is_as_far_as_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = _run(tmp_path, "gpt2/mlp-8/a", done=False)
    for tokens, n_tokens in (("9000", 10_000), ("11264", 11_264), ("final", 11_264), (".12000", 11_264)):
        (folder / "checkpoints" / tokens).mkdir(parents=True)
        assert [run.tokens for run in find_runs(tmp_path)] == [n_tokens]


def test_a_dictionary_in_lockstep_is_as_far_as_the_checkpoint_of_all(tmp_path: Path) -> None:
    folder = _run(tmp_path, "gpt2/layers/a/mlp-8", done=False, lockstep=True)
    (folder.parent / "checkpoints" / "12000").mkdir(parents=True)
    assert [run.tokens for run in find_runs(tmp_path)] == [12_000]


def test_prefixes_have_a_row_each_when_asked_for(tmp_path: Path) -> None:
    _run(tmp_path, "gpt2/mlp-8/a")
    assert "first 768" not in _shown(tmp_path)
    shown = _shown(tmp_path, prefixes=True)
    assert "first 768" in shown
    assert "0.600" in shown


def test_a_run_can_be_named_like_markup(tmp_path: Path) -> None:
    _run(tmp_path, "gpt2/mlp-8/[bold]x[", done=False)
    _run(tmp_path, "gpt2/mlp-8/a\\[b]", done=False)
    assert "[bold]x[" in _shown(tmp_path)
    assert "a\\[b]" in _shown(tmp_path)


def test_a_lock_that_is_not_ours_to_open_is_not_taken_for_a_live_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run(tmp_path, "gpt2/mlp-8/a", done=False)
    (folder / ".lock").touch()

    def denied(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr("filelock.FileLock.acquire", denied)
    assert [run.status for run in find_runs(tmp_path)] == ["interrupted"]


def test_a_run_whose_metrics_are_damaged_is_listed_as_such(tmp_path: Path) -> None:
    log = _run(tmp_path, "gpt2/mlp-8/a-log", done=False) / "metrics.jsonl"
    log.write_text("not json\n" + log.read_text())
    (_run(tmp_path, "gpt2/mlp-8/b-evaluation") / "metrics.json").write_text("{")
    assert [(run.name, run.status) for run in find_runs(tmp_path)] == [
        ("a-log", "damaged"),
        ("b-evaluation", "damaged"),
    ]
    shown = "".join(_shown(tmp_path).split())
    assert "metrics.jsonl,line1:expectedaJSONobject" in shown
    assert "metrics.jsonisnoevaluation" in shown


@pytest.mark.parametrize("config", ["a: [b", "", "model_name: gpt2\n", "started_at: 1\n"])
def test_a_run_whose_settings_are_damaged_is_listed_as_such(tmp_path: Path, config: str) -> None:
    (_run(tmp_path, "gpt2/mlp-8/a") / "config.yaml").write_text(config)
    _run(tmp_path, "gpt2/mlp-8/b")
    assert [(run.model, run.mapping, run.name, run.status) for run in find_runs(tmp_path)] == [
        ("gpt2", "mlp-8", "a", "damaged"),
        ("gpt2", "mlp-8", "b", "done"),
    ]
    assert "a/config.yamlhasnotthesettingsthat" in "".join(_shown(tmp_path).split())


def test_a_run_has_its_name_where_it_is_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_run(tmp_path, "gpt2/mlp-8/first"))
    assert [(run.folder, run.mapping, run.name) for run in find_runs(Path())] == [(".", "mlp-8", "first")]


def test_no_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        find_runs(tmp_path / "results")
    assert find_runs(tmp_path) == []


def test_runs_in_lockstep_of_one_name_are_told_apart_by_what_they_learn(tmp_path: Path) -> None:
    for place in ("gpt2/mlp-0-1/first/mlp-0", "gpt2/mlp-0-3/first/mlp-0"):
        _run(tmp_path, place, lockstep=True)
    shown = _shown(tmp_path)
    assert "gpt2 · mlp-0-1/first" in shown
    assert "gpt2 · mlp-0-3/first" in shown
