"""`train --resume` on run folders: what is taken, what is refused, and how the process ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from saelens_matryoshka.cli import app
from saelens_matryoshka.runs.fields import Given
from saelens_matryoshka.runs.folder import RunFolder
from saelens_matryoshka.runs.lock import locked
from saelens_matryoshka.runs.recorded import read_lines
from saelens_matryoshka.runs.settings import resolve
from saelens_matryoshka.runs.training import RunRunner, resume_run

FLAGS = [
    "--model_name",
    "tiny",
    "--mapping",
    "mlp",
    "--layer",
    "2",
    "--d_sae",
    "64",
    "-k",
    "4",
    "--training_tokens",
    "1280",
    "--train_batch_size_tokens",
    "128",
    "--context_size",
    "32",
    "--store_batch_size_prompts",
    "4",
    "--n_batches_in_buffer",
    "8",
    "--n_eval_batches",
    "2",
    "--log-every",
    "1",
]


def _cli(*words: str) -> Any:
    return CliRunner().invoke(app, ["train", *words])


def _result(run: RunFolder) -> dict[str, Any]:
    lines = read_lines(run.metrics_log)
    for line in lines:
        line.pop("seconds")
        line.pop("tokens_per_second")
    weights = (run.path / "sae_weights.safetensors").read_bytes()
    return {"weights": weights, "log": lines, "metrics": json.loads(run.metrics.read_text())}


class _Stopping(RunRunner):
    """Is sent a signal after a step."""

    step, number = 4, signal.SIGTERM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observers.append(self._stop)

    def _stop(self, trainer: Any, _: Any) -> None:
        if trainer.n_training_steps == self.step:
            signal.raise_signal(self.number)


def test_stopped_run_is_gone_on_with_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "gestoppter Lauf ä")
    assert _cli(*FLAGS, "--output_path", str(whole.path)).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr("saelens_matryoshka.runs.training.RunRunner", _Stopping)
        found = _cli(*FLAGS, "--output_path", str(stopped.path), "--keep", "1")
        assert found.exit_code == 143
        assert "Stopped after step 4, as asked." in found.output
        assert f"train --resume '{stopped.path}'" in found.output
        # as a process leaves it that was killed after the checkpoint: a line more, a line cut short
        with stopped.metrics_log.open("a") as log:
            log.write(json.dumps({"step": 5, "tokens": 640, "seconds": 1.0}) + '\n{"step": 6, "tok')
        (stopped.path / "sae_weights.safetensors").write_bytes(b"half")
        patched.setattr(_Stopping, "step", 7)
        patched.setattr(_Stopping, "number", signal.SIGINT)
        found = _cli("--resume", str(stopped.path))
        assert found.exit_code == 130
        assert f"Going on with {stopped.path}, after step 4\n" in found.output
    assert [path.name for path in stopped.checkpoints.iterdir()] == [str(7 * 128)]
    assert not stopped.read().get("completed_at")
    found = _cli("--resume", str(stopped.path), "--json")
    assert found.exit_code == 0, found.output
    assert _result(stopped) == _result(whole)
    assert stopped.read()["completed_at"]
    assert _result(whole)["log"][-1]["step"] == 10


@pytest.mark.parametrize("layers", [["--layer", "2"], ["--layers", "1-2", "--name", "run", "--out"]])
@pytest.mark.parametrize("what", ["sae_lens.TrainingSAE.save_inference_model", "write_atomically"])
def test_a_disk_that_is_full_after_the_last_step_is_told_with_how_to_go_on(
    what: str, layers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = "--out" in layers
    run = tmp_path / "tiny" / "mlp-1-2" / "run" if several else tmp_path / "run"
    place = [str(tmp_path)] if several else ["--output_path", str(run)]

    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    flags = [*FLAGS[: FLAGS.index("--layer")], *FLAGS[FLAGS.index("--layer") + 2 :]]
    with monkeypatch.context() as patched:
        patched.setattr(what if "." in what else f"saelens_matryoshka.runs.training.{what}", full)
        found = _cli(*flags, *layers, *place)
    assert found.exit_code == 1
    assert "All steps are done and kept in a checkpoint" in found.output
    assert "No space left on device" in found.output
    assert f"To go on: saelens-matryoshka train --resume {run}\n" in found.output
    found = _cli("--resume", str(run))
    assert found.exit_code == 0, found.output
    assert "after step 10" in found.output


def test_a_damaged_log_is_refused_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("saelens_matryoshka.runs.training.RunRunner", _Stopping)
        assert _cli(*FLAGS, "--output_path", str(run.path)).exit_code == 143
    lines = run.metrics_log.read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], "\x00" * 9 + "\n", *lines[2:]])
    run.metrics_log.write_text(damaged)
    found = _cli("--resume", str(run.path))
    assert "metrics.jsonl, line 2: expected a JSON object" in str(found.exception)
    assert run.metrics_log.read_text() == damaged


def test_a_checkpoint_on_the_disk_has_its_log_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a log that is behind the checkpoint would lack lines for good."""
    run, on_disk, sync, rename = RunFolder(tmp_path / "run"), [0], os.fsync, os.rename

    def synced(file: int) -> None:
        if run.metrics_log.exists() and os.path.samestat(os.fstat(file), run.metrics_log.stat()):
            on_disk[0] = os.fstat(file).st_size
        sync(file)

    def renamed(old: Path, new: Path) -> None:
        assert on_disk[0] == run.metrics_log.stat().st_size > 0
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr("saelens_matryoshka.upkeep.checkpoints.os.rename", renamed)
    assert _cli(*FLAGS, "--output_path", str(run.path), "--n_checkpoints", "2").exit_code == 0
    assert len(list(run.checkpoints.iterdir())) == 2


def test_a_run_that_another_process_has_just_finished_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    settings = {"model_name": "tiny", "mapping": "mlp", "layer": 2, "d_sae": 64, "k": 4}
    run.write_config(resolve([{name: Given(value, "test") for name, value in settings.items()}]))
    weights = run.path / "sae_weights.safetensors"
    weights.write_bytes(b"of the other process")

    @contextmanager
    def locked_when_it_is_done(_: Path) -> Iterator[None]:
        run.add_record("completed_at", "2026-01-01")
        yield

    monkeypatch.setattr("saelens_matryoshka.runs.training.locked", locked_when_it_is_done)
    with pytest.raises(ValueError, match="holds a finished run"):
        resume_run(run)
    assert weights.read_bytes() == b"of the other process"


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    def error(*words: str) -> str:
        found = _cli(*words)
        assert isinstance(found.exception, ValueError), found.output
        assert not found.output, "it says that it goes on before it knows"
        return str(found.exception)

    assert "is not the folder of a run" in error("--resume", str(tmp_path))
    assert "is not the folder of a run" in error("--resume", str(tmp_path / "missing"))
    (tmp_path / "config.yaml").write_text("completed_at: '2026-01-01'\n")
    assert "holds a finished run" in error("--resume", str(tmp_path))
    for upkeep, says in {
        "3": "upkeep=3 in the run's config.yaml must be a mapping of log_every, keep, ",
        "{keeep: 3}": "upkeep={'keeep': 3} in the run's config.yaml must be a mapping",
        "{keep: 1.5}": "--keep 1.5 must be a number, 0 or larger, and whole",
        "{checkpoint_minutes: often}": "--checkpoint-minutes often must be a number",
        "{log_every: often}": "upkeep={'log_every': 'often'} in the run's config.yaml must be a mapping",
    }.items():
        settings = "model_name: tiny, mapping: mlp, layer: 2, d_sae: 256, k: 8"
        (tmp_path / "config.yaml").write_text(f"{{{settings}, upkeep: {upkeep}}}")
        assert says in error("--resume", str(tmp_path))
    (tmp_path / "config.yaml").write_text("{model_name: tiny, mapping: mlp, layer: 2, d_sae: 256, k: 8}")
    assert "leave out --layer --lr" in error("--resume", str(tmp_path), "--layer", "2", "--lr")
    with locked(tmp_path):
        assert "is in use: another process" in error("--resume", str(tmp_path))
    assert "--keep -1 must be a number" in error(*FLAGS, "--keep", "-1")
    assert "--checkpoint-minutes nan must be" in error(*FLAGS, "--checkpoint-minutes", "nan")


def test_second_run_on_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if both found it unused, and the other was quicker."""
    run = tmp_path / "run"

    class Slow(RunRunner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            run.mkdir()
            held.__enter__()

    run_lock = locked(run)
    held = run_lock
    monkeypatch.setattr("saelens_matryoshka.runs.training.RunRunner", Slow)
    found = _cli(*FLAGS, "--output_path", str(run))
    held.__exit__(None, None, None)
    assert "is in use" in str(found.exception)
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    """Four real signals to real processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    seed = str(random.Random(0).randrange(1000))
    soak = [sys.executable, "-m", "benchmarks.soak", "--restarts", "4", "--steps", "0", "--seed", seed]
    done = subprocess.run(soak, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "all bit-identical to the uninterrupted runs" in done.stdout
