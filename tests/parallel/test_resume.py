"""A job of some processes that was stopped and resumed ends as one that never stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from saelens_matryoshka import tiny
from saelens_matryoshka.cli import app
from saelens_matryoshka.runs import training
from saelens_matryoshka.upkeep.keeper import Keeper
from tests.parallel.processes import run_job

STEPS, STOP, BATCH = 8, 5, 300  # of which 100 rows are kept for the threshold, which 3 does not divide
TRAIN = (
    f"train --preset tiny --mapping mlp --layer 2 --d_sae 128 -k 8 --train_batch_size_tokens {BATCH} "
    f"--training_tokens {BATCH * STEPS} --context_size 32 --store_batch_size_prompts 4 "
    "--n_batches_in_buffer 16 --n_eval_batches 1 --eval_batch_size_prompts 4 --name run --log-every 1"
).split()
SHARDED = ["--shard", "dictionary"]


def command(arguments: list[str], stop_after: int | None = None) -> tuple[int, list[int], str]:
    """Exit code, steps and errors of a command in this process; the last one is told to stop after a step."""
    steps: list[int] = []
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    keep = Keeper.__call__

    def after_step(keeper: Keeper, trainer: Any, output: Any) -> None:
        steps.append(trainer.n_training_steps)
        if is_last and trainer.n_training_steps == stop_after:
            keeper.stop.number = signal.SIGTERM
        keep(keeper, trainer, output)

    Keeper.__call__ = after_step  # type: ignore[method-assign]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, steps, f"{result.output} {result.exception!r}"


def run(n: int, folder: Path, arguments: list[str], stop_after: int | None = None) -> list[list[int]]:
    """The steps of all processes of a job that trains in a folder."""
    results = run_job(n, folder, command, arguments, stop_after)
    for exit_code, _, said in results:
        assert exit_code == (0 if stop_after is None else 143), said
    return [steps for _, steps, _ in results]


def train(n: int, folder: Path, *arguments: str, stop_after: int | None = None) -> list[list[int]]:
    folder.mkdir(exist_ok=True)
    return run(n, folder, [*TRAIN, "--out", str(folder), *arguments], stop_after)


def resume(n: int, folder: Path, *arguments: str) -> list[list[int]]:
    return run(n, folder, ["train", "--resume", str(run_folder(folder)), *arguments])


def run_folder(folder: Path) -> Path:
    return folder / "tiny" / "mlp-2" / "run"


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_folder(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.fixture
def text() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": [row["text"][:400] for row in tiny.text.dataset("train").select(range(60))]}
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the runs read a dataset."""
    stock = training.overrides

    def read(dataset: Any) -> None:
        monkeypatch.setattr(
            training, "overrides", lambda settings: stock(settings) | {"override_dataset": dataset}
        )

    return read


CASES = {
    "data parallel": (2, "map", []),
    "sharded, prefetching": (2, "map", [*SHARDED, "--prefetch_llm_batches", "2"]),
    "three, streaming": (3, "streaming", []),
    "sharded, files": (2, "files", SHARDED),
}


def form_of(text: datasets.Dataset, form: str) -> Any:
    return text if form == "map" else text.to_iterable_dataset(num_shards=4 if form == "files" else 1)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == "data parallel" else [pytest.mark.slow]) for case in CASES],
)
def test_a_stopped_job_ends_as_an_uninterrupted_one(
    case: str, text: datasets.Dataset, read: Any, tmp_path: Path
) -> None:
    n, form, arguments = CASES[case]
    read(form_of(text, form))
    left_alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    train(n, left_alone, *arguments)
    steps = train(n, stopped, *arguments, stop_after=STOP)
    assert steps == n * [list(range(1, STOP + 1))]
    steps = resume(n, stopped, *(SHARDED if "--shard" in arguments else []))
    assert steps == n * [list(range(STOP + 1, STEPS + 1))]
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        assert (run_folder(left_alone) / name).read_bytes() == (run_folder(stopped) / name).read_bytes()
    assert metrics(left_alone) == metrics(stopped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, SHARDED), (3, [])), ((3, SHARDED), (1, [])), ((1, []), (2, SHARDED))], ids=str
)
def test_any_number_of_processes_goes_on_in_any_mode(
    before: tuple[int, list[str]],
    after: tuple[int, list[str]],
    text: datasets.Dataset,
    read: Any,
    tmp_path: Path,
) -> None:
    read(text)
    train(before[0], tmp_path, *before[1], stop_after=STOP)
    steps = resume(after[0], tmp_path, *after[1])
    assert steps == after[0] * [list(range(STOP + 1, STEPS + 1))]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["tokens"] == BATCH * STEPS
    assert abs(lines[-1]["l0"] - 8) < 0.1
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert SAE.load_from_disk(run_folder(tmp_path)).W_dec.shape == (128, 128)


@pytest.mark.slow
def test_a_job_on_a_cache_has_the_batches_of_one_process(cache_folder: Path, tmp_path: Path) -> None:
    arguments = ["--cache", str(cache_folder)]
    alone, two = tmp_path / "alone", tmp_path / "two"
    train(1, alone, *arguments)
    train(2, two, *arguments, stop_after=STOP)
    assert resume(3, two, *SHARDED) == 3 * [list(range(STOP + 1, STEPS + 1))]
    for one, other in zip(metrics(alone), metrics(two), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


# ---- shares that are not equal


def one_short_share(text: datasets.Dataset) -> Any:
    """Two documents for the first of two processes, and one short one for the second."""
    rows = [" ".join(text["text"][:10]), text["text"][10] * 3, text["text"][11], text["text"][12] * 40]
    return datasets.Dataset.from_dict({"text": rows})


def uneven_files(n_files: int) -> Any:
    def rows(files: list[int]) -> Any:
        documents = tiny.text.dataset("train")
        for file in files:
            for index in range(1 + 5 * file):
                yield {"text": documents[10 * file + index]["text"][:600]}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": list(range(n_files))})


@pytest.mark.parametrize(
    ("n", "make"),
    [
        pytest.param(2, one_short_share, id="one document"),
        pytest.param(3, lambda text: text.select(range(14)), id="three", marks=pytest.mark.slow),
        pytest.param(2, lambda _: uneven_files(4), id="files", marks=pytest.mark.slow),
        pytest.param(3, lambda _: uneven_files(4), id="files, one by one", marks=pytest.mark.slow),
    ],
)
def test_shares_of_other_sizes_take_the_same_steps(
    n: int, make: Callable[[datasets.Dataset], Any], text: datasets.Dataset, read: Any, tmp_path: Path
) -> None:
    read(make(text))
    assert train(n, tmp_path) == n * [list(range(1, STEPS + 1))]
    assert metrics(tmp_path)[-1]["tokens"] == BATCH * STEPS
