"""Kill a training run again and again, and compare what it becomes with a run that was left alone.

    python -m benchmarks.soak

Two parts, each bounded in time:

1. `saelens-matryoshka train` is started on the embedded model, and a random signal (SIGKILL, SIGTERM, SIGINT)
   is sent at a random moment: anywhere, during training, or while a checkpoint is being written.
   `train --resume` starts it again, 50 times over. Each run that reaches its end must have, to the last bit,
   the weights, sparsity, metrics.jsonl (but for the times) and metrics.json of one that was never stopped.
2. 20,000 small steps, with checkpoints: the memory must stay flat.

Processes are forked from one that has imported everything, so that the time goes into training and not into
imports; what runs in them is the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.machine import describe
from saelens_matryoshka.cli import main as command_line
from saelens_matryoshka.evaluation.evaluator import evaluate  # noqa: F401  (imported before the forks)
from saelens_matryoshka.runs.folder import RunFolder
from saelens_matryoshka.runs.training import resume_run  # noqa: F401

STEPS, BATCH = 120, 256
SHARED = {
    "model_name": "tiny",
    "layer": 2,
    "d_sae": 256,
    "k": 8,
    "training_tokens": STEPS * BATCH,
    "train_batch_size_tokens": BATCH,
    "context_size": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 16,
    "n_eval_batches": 1,
    "log-every": 1,
    "checkpoint-minutes": 0.004,
}
RUNS: dict[str, dict[str, Any]] = {
    "transcoder": {
        "mapping": "mlp",
        "normalize_activations": "expected_average_only_in",
        "n_batches_for_norm_estimate": 20,
    },
    "sae, prefetching": {"architecture": "matryoshka_sae", "prefetch_llm_batches": True},
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("anywhere", "in training", "in a checkpoint")
LONGEST_WAIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restarts", type=int, default=50, help="0 leaves this part out")
    parser.add_argument("--steps", type=int, default=20_000, help="of the memory part; 0 leaves it out")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the restarts, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of a sum must not depend on who is free
    figures: dict[str, Any] = {"machine": describe("cpu")}
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        if args.restarts:
            figures["restarts"] = restarts(Path(folder), args.restarts, args.minutes, args.seed)
            print(figures["restarts"]["table"])
            ok &= figures["restarts"]["identical"]
        if args.steps:
            figures["memory"] = memory(Path(folder), args.steps)
            print(figures["memory"]["table"])
            ok &= figures["memory"]["flat"]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    sys.exit(0 if ok else 1)


# ---- restarts


@dataclass
class Tally:
    """What was done to the runs, and what came of it."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    exit_codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    finished: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)

    def n_restarts(self) -> int:
        return sum(self.sent.values())


def restarts(folder: Path, n_restarts: int, minutes: float, seed: int) -> dict[str, Any]:
    """Stop and resume runs until there have been `n_restarts`, let the last ones end, and compare."""
    deadline = time.monotonic() + 60 * minutes
    expected: dict[str, Any] = {}
    chance, tally, n = random.Random(seed), Tally(), 0
    while tally.n_restarts() < n_restarts and time.monotonic() < deadline:
        kind = list(RUNS)[n % len(RUNS)]
        run, n = _folder(folder, kind, f"stopped-{n}"), n + 1
        while not _is_finished(run):
            stop = tally.n_restarts() < n_restarts and time.monotonic() < deadline
            _attempt(run, kind, chance if stop else None, tally)
        tally.finished[kind] += 1
        if kind not in expected:
            expected[kind] = result(_train(folder, kind, "whole"))
        if result(run) != expected[kind]:
            tally.different.append(str(run))
    rows = [f"| {name} | {moment} | {count} |" for (name, moment), count in sorted(tally.sent.items())]
    codes = ", ".join(f"{name} → {code}: {count}" for (name, code), count in sorted(tally.exit_codes.items()))
    identical = not tally.different and not tally.unexpected and tally.n_restarts() >= n_restarts
    table = "\n".join(
        [
            "| signal | moment | restarts |",
            "|---|---|---:|",
            *rows,
            "",
            f"exit codes: {codes}",
            f"{tally.n_restarts()} restarts; runs that reached their end: "
            + ", ".join(f"{count} × {kind}" for kind, count in tally.finished.items()),
            *(f"UNEXPECTED: {text}" for text in tally.unexpected),
            *(f"DIFFERENT: {path}" for path in tally.different),
            "all bit-identical to the uninterrupted runs" if identical else "NOT AS IT SHOULD BE",
        ]
    )
    return {
        "n_restarts": tally.n_restarts(),
        "finished": dict(tally.finished),
        "identical": identical,
        "table": table,
    }


def result(run: RunFolder) -> dict[str, Any]:
    """What must be the same, to the last bit, whether or not a run was stopped."""
    times = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in run.metrics_log.read_text().splitlines()]
    return {
        "weights": (run.path / "sae_weights.safetensors").read_bytes(),
        "sparsity": (run.path / "sparsity.safetensors").read_bytes(),
        "cfg": (run.path / "cfg.json").read_text(),
        "metrics.jsonl": [{k: v for k, v in line.items() if k not in times} for line in lines],
        "metrics.json": run.metrics.read_text(),
    }


def _folder(folder: Path, kind: str, name: str) -> RunFolder:
    return RunFolder(folder / kind / name)


def _is_finished(run: RunFolder) -> bool:
    return run.config.exists() and bool(run.read().get("completed_at"))


def _train(folder: Path, kind: str, name: str) -> RunFolder:
    run = _folder(folder, kind, name)
    code = _wait(_start(run, kind))
    if code != 0:
        raise RuntimeError(f"The uninterrupted run ended with {code}: see {run.path}.log")
    return run


def _start(run: RunFolder, kind: str) -> int:
    """Fork the command line: a new run, or one to go on with. Returns the process id."""
    if run.config.exists():
        words = ["--resume", str(run.path)]
    else:
        settings = SHARED | RUNS[kind] | {"output_path": str(run.path)}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        if settings.get("prefetch_llm_batches"):
            words.remove("True")
    # A signal that comes before the child is within `try` waits: there it would do this process's clean-up.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        return pid
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(f"{run.path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        sys.argv = ["saelens-matryoshka", "train", *words]
        command_line()
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except KeyboardInterrupt:  # before the command line was there to catch it
        os._exit(128 + signal.SIGINT)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


def _wait(pid: int) -> int:
    """Exit code of a process; minus the signal if one ended it."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999


def _last_words(run: RunFolder) -> str:
    return Path(f"{run.path}.log").read_text(errors="replace")[-1000:]


def _is_alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _attempt(run: RunFolder, kind: str, chance: random.Random | None, tally: Tally) -> None:
    """Start or resume a run, and stop it, if there is a chance."""
    pid = _start(run, kind)
    if chance is None:
        if (code := _wait(pid)) != 0:
            tally.unexpected.append(f"{run.path.name} ended with {code} unasked: {_last_words(run)}")
            raise RuntimeError(tally.unexpected[-1])
        return
    number, moment = chance.choice(SIGNALS), chance.choice(MOMENTS)
    _wait_for(moment, run, pid, chance)
    if not _is_alive(pid):  # it came to its end first
        code = _wait(pid)
        if code != 0:
            tally.unexpected.append(f"{run.path.name} ended with {code} unasked: {_last_words(run)}")
            raise RuntimeError(tally.unexpected[-1])
        return
    os.kill(pid, number)
    code = _wait(pid)
    tally.sent[number.name, moment] += 1
    tally.exit_codes[number.name, code] += 1
    # a shell's code, or, before the training has begun or after it, the signal's own end; or it was over
    allowed = {0, 128 + number, -number} | ({1} if number == signal.SIGINT else set())
    if code not in allowed:
        tally.unexpected.append(f"{number.name} {moment}: ended with {code}, see {run.path}.log")


def _wait_for(moment: str, run: RunFolder, pid: int, chance: random.Random) -> None:
    if moment == "anywhere":
        time.sleep(chance.uniform(0, 6))
        return

    def size() -> int:
        return run.metrics_log.stat().st_size if run.metrics_log.exists() else 0

    before, deadline = size(), time.monotonic() + LONGEST_WAIT_S
    left_behind = set(run.checkpoints.glob(".aside-*"))  # by one that was killed
    while _is_alive(pid) and time.monotonic() < deadline:
        if moment == "in training" and size() > before:
            time.sleep(chance.uniform(0, 1.5))
            return
        if moment == "in a checkpoint" and set(run.checkpoints.glob(".aside-*")) - left_behind:
            time.sleep(chance.uniform(0, 0.02))
            return
        time.sleep(0.002)


# ---- memory


def memory(folder: Path, n_steps: int) -> dict[str, Any]:
    """Resident memory of one process over many small steps, checkpoints among them."""
    from saelens_matryoshka.runs.settings import read_flags, resolve
    from saelens_matryoshka.runs.training import RunRunner, train_run
    from saelens_matryoshka.upkeep.keeper import Upkeep

    batch = 32
    settings = SHARED | RUNS["transcoder"] | {"d_sae": 64, "k": 4, "matryoshka_widths": "16 64"}
    settings |= {
        "training_tokens": n_steps * batch,
        "train_batch_size_tokens": batch,
        "n_batches_in_buffer": 4,
    }
    words = [
        word
        for name, value in settings.items()
        if name not in ("log-every", "checkpoint-minutes")
        for word in (f"--{name}", *str(value).split())
    ]
    flags = read_flags(words)
    samples: dict[int, float] = {}
    process, every = psutil.Process(), max(n_steps // 20, 1)

    class Sampled(RunRunner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.observers.append(sample)

    def sample(trainer: Any, _: Any) -> None:
        if trainer.n_training_steps % every == 0:
            samples[trainer.n_training_steps] = process.memory_info().rss / 1e6

    from saelens_matryoshka.runs import training

    training.RunRunner = Sampled  # type: ignore[misc]
    try:
        train_run(
            resolve([flags]),
            RunFolder(folder / "memory"),
            log_every=10,
            upkeep=Upkeep(checkpoint_minutes=0.05),
        )
    finally:
        training.RunRunner = RunRunner  # type: ignore[misc]
    steps = sorted(samples)
    tenth, last = samples[steps[len(steps) // 10]], samples[steps[-1]]
    growth = last - tenth
    table = "\n".join(
        ["| step | resident MB |", "|---:|---:|"]
        + [f"| {step:,} | {samples[step]:.1f} |" for step in steps]
        + [f"growth from step {steps[len(steps) // 10]:,} to {steps[-1]:,}: {growth:+.1f} MB"]
    )
    return {"samples": samples, "growth_mb": growth, "flat": growth < 0.03 * tenth, "table": table}


if __name__ == "__main__":
    main()
