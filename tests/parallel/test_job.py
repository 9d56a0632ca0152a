"""`torchrun ... -m saelens_matryoshka train`, as a user calls it."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from sae_lens import SAE
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from typer.testing import CliRunner

from saelens_matryoshka.cli import app
from saelens_matryoshka.parallel import Sharding, mesh_shape
from saelens_matryoshka.parallel.job import Job
from tests import forked
from tests.helpers import runner_config, transcoder_config

REPOSITORY = Path(__file__).parents[2]
COMMAND = (
    "train --preset tiny --mapping mlp --layer 2 --d_sae 256 --train_batch_size_tokens 256 "
    "--n_batches_in_buffer 16 --n_eval_batches 1 --eval_batch_size_prompts 4 --name run --log-every 1"
)
TRAIN = COMMAND.split()
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "COLUMNS": "120",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}


@dataclass
class Launched:
    """Processes that torchrun has started in a folder."""

    process: subprocess.Popen[bytes] | multiprocessing.process.BaseProcess
    log: Path

    def is_running(self) -> bool:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    def end(self) -> tuple[int | None, str]:
        """Wait for its exit code and what all of it has printed."""
        if isinstance(self.process, subprocess.Popen):
            code = self.process.wait(timeout=500)
        else:
            self.process.join(timeout=500)
            code = self.process.exitcode
        return code, self.log.read_text()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()


def torchrun(n: int, folder: Path, *arguments: str) -> Launched:
    """A job of n processes, started as a user does."""
    program = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *program, "saelens_matryoshka", *arguments],
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
        )
    return Launched(process, folder / "log")


def forked_torchrun(n: int, folder: Path, *arguments: str) -> Launched:
    """The same, by torchrun's own launcher, but forked: without importing SAELens in each of them."""
    with (folder / "log").open("wb") as log:
        process = forked.start(
            _launch, n, arguments, cwd=folder, out=log.fileno(), err=log.fileno(), env=ENVIRONMENT
        )
    return Launched(process, folder / "log")


def _launch(n: int, arguments: tuple[str, ...]) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="job",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _worker)(*arguments)


def _worker(*arguments: str) -> None:
    sys.argv = ["saelens_matryoshka", *arguments]
    runpy.run_module("saelens_matryoshka", run_name="__main__")


@pytest.mark.slow
def test_a_job_trains_and_the_first_process_writes(tmp_path: Path) -> None:
    shards = ["--shard", "dictionary", "--shards", "2"]
    evaluated = ["--wandb", "--wandb_log_frequency", "2", "--eval_every_n_wandb_logs", "5"]
    with forked_torchrun(4, tmp_path, *TRAIN, "--training_tokens", "5120", *shards, *evaluated) as job:
        code, said = job.end()
    assert code == 0, said
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


def wait_for_checkpoint(run: Path, job: Launched) -> None:
    """Wait until a job has written a checkpoint."""
    before, until = last_saved(run), time.monotonic() + 200
    while last_saved(run) == before:
        assert time.monotonic() < until
        assert job.is_running(), job.log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_shard_or_sigterm_ends_the_job_which_any_number_of_processes_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ["--checkpoint-minutes", "0.0001", "--shard", "dictionary"]
    run = tmp_path / "results" / "tiny" / "mlp-2" / "run"
    with torchrun(2, tmp_path, *TRAIN, "--training_tokens", "25600", *often) as job:
        wait_for_checkpoint(run, job)
        workers = [
            process
            for process in psutil.Process(job.process.pid).children(recursive=True)
            if process.environ().get("RANK") == "1"
        ]
        workers[0].send_signal(signal.SIGKILL)
        code, said = job.end()
    assert code != 0
    assert "has lost another one" in said
    assert "The last good checkpoint is" in said
    assert "--resume" in said

    again = ["train", "--resume", str(run.relative_to(tmp_path))]
    with forked_torchrun(2, tmp_path, *again, *often) as job:
        wait_for_checkpoint(run, job)
        assert job.process.pid is not None
        os.kill(job.process.pid, signal.SIGTERM)  # to torchrun, as a scheduler sends it
        code, said = job.end()
    assert code != 0
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


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_refuses_a_dictionary_that_is_not_there(rank: int, tmp_path: Path) -> None:
    """The first alone reads it: its error would leave the others waiting for it."""
    group: Any = SimpleNamespace(rank=rank, shards=2)
    cfg = runner_config(transcoder_config(), from_pretrained_path=str(tmp_path))
    with pytest.raises(ValueError, match="from_pretrained_path=.* holds no dictionary"):
        Job(group).overrides(cfg)
