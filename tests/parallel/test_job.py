"""`torchrun ... -m saelens_matryoshka train`, as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from saelens_matryoshka.cli import app
from saelens_matryoshka.parallel import Sharding, mesh_shape

REPOSITORY = Path(__file__).parents[2]
COMMAND = (
    "train --preset tiny --mapping mlp --layer 2 --d_sae 256 --train_batch_size_tokens 256 "
    "--n_batches_in_buffer 16 --n_eval_batches 1 --eval_batch_size_prompts 4 --name run --log-every 1"
)
TRAIN = COMMAND.split()


def start(n: int, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A job of n processes, in a folder; one is not started by torchrun."""
    launch = [] if n == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
        "COLUMNS": "120",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *launch, "saelens_matryoshka", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_job_trains_and_the_first_process_writes(tmp_path: Path) -> None:
    shards = ["--shard", "dictionary", "--shards", "2"]
    evaluated = ["--wandb", "--wandb_log_frequency", "2", "--eval_every_n_wandb_logs", "5"]
    job = start(4, tmp_path, *TRAIN, "--training_tokens", "5120", *shards, *evaluated)
    said, _ = job.communicate(timeout=500)
    assert job.returncode == 0, said
    run = tmp_path / "results" / "tiny" / "mlp-2" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["tokens"] == 5120
    assert abs(lines[-1]["l0"] - 16) < 0.01  # over all shards: k of every row
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert SAE.load_from_disk(run).W_dec.shape == (256, 128)
    assert said.count("Saved in") == 1
    (logged,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"held_out/ce_recovered_w256" in logged.read_bytes()


def last_saved(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none."""
    return max((int(path.name) // 256 for path in run.glob("checkpoints/[0-9]*")), default=0)


def wait_for_checkpoint(run: Path, job: subprocess.Popen[str]) -> None:
    """Wait until a job has written a checkpoint."""
    before, until = last_saved(run), time.monotonic() + 200
    while last_saved(run) == before:
        assert time.monotonic() < until
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_shard_or_sigterm_ends_the_job_which_any_number_of_processes_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ["--checkpoint-minutes", "0.0001", "--shard", "dictionary"]
    job = start(2, tmp_path, *TRAIN, "--training_tokens", "25600", *often)
    run = tmp_path / "results" / "tiny" / "mlp-2" / "run"
    try:
        wait_for_checkpoint(run, job)
        workers = [
            process
            for process in psutil.Process(job.pid).children(recursive=True)
            if process.environ().get("RANK") == "1"
        ]
        workers[0].send_signal(signal.SIGKILL)
        said, _ = job.communicate(timeout=100)
    finally:
        job.kill()
    assert job.returncode != 0
    assert "has lost another one" in said
    assert "The last good checkpoint is" in said
    assert "--resume" in said

    again = ["train", "--resume", str(run.relative_to(tmp_path))]
    job = start(2, tmp_path, *again, *often)
    try:
        wait_for_checkpoint(run, job)
        job.send_signal(signal.SIGTERM)  # to torchrun, as a scheduler sends it
        said, _ = job.communicate(timeout=100)
    finally:
        job.kill()
    assert job.returncode != 0
    assert f"Stopped after step {last_saved(run)}, as asked" in said
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == last_saved(run) < 100

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, again)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 101))
    assert lines[-1]["tokens"] == 25600


@pytest.mark.parametrize(
    ("sharding", "shards", "shape"),
    [
        (None, None, (8, 1)),
        ("dictionary", None, (1, 8)),
        ("dictionary", 2, (4, 2)),
        ("dictionary", 1, (8, 1)),
    ],
)
def test_processes_are_copies_of_shards(
    sharding: Sharding | None, shards: int | None, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert mesh_shape(sharding, shards) == shape


@pytest.mark.parametrize("shards", [-1, 0, 3, 16])
def test_shards_that_do_not_divide_the_processes_are_refused(
    shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match=rf"--shards {shards} does not divide the 8 .* one of 1, 2, 4, 8"):
        mesh_shape("dictionary", shards)


def test_sharding_one_process_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*TRAIN, "--shard", "dictionary", "--out", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert "torchrun --nproc-per-node" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_another_way_to_shard_is_refused() -> None:
    result = CliRunner().invoke(app, [*TRAIN, "--shard", "rows"])
    assert "--shard rows is not known" in str(result.exception)
