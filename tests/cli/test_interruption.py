"""Ctrl-C and SIGTERM in the commands that take long: the exit code, what is said, and what is left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants

import saelens_matryoshka as sm
import saelens_matryoshka.report.collect as collect
from saelens_matryoshka.cli import main
from saelens_matryoshka.evaluation import evaluator
from saelens_matryoshka.evaluation.evaluator import Evaluation
from saelens_matryoshka.formats import export, frame_report
from saelens_matryoshka.report import Samples
from saelens_matryoshka.runs import settings, training
from tests.forked import start
from tests.report.conftest import random_sae

SAMPLES = ("--tokens", 1500, "--context", 5, "--top", 3)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A stock SAE of the embedded model in a folder."""
    random_sae().save_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the state of evaluations is kept."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "saelens_matryoshka"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call_(*args: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out + said.err

    return call_


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _raising(number: int, function: Any, after: int = 0) -> Any:
    """The function, in whose call number `after` a signal comes."""
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            signal.raise_signal(number)
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_hooks_says_that_it_keeps_nothing(
    number: int, model: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_report, "measure_frames", _raising(number, frame_report.measure_frames))
    code, said = call("hooks", "tiny", "--transcoder", model)
    assert code == 128 + number
    assert "Interrupted. Nothing is kept of what was measured" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_samples_and_report_go_on_where_they_were_stopped(
    number: int, model: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("samples", model, *SAMPLES, "--out", tmp_path / "whole")[0] == 0
    before = _files(model)
    with monkeypatch.context() as patched:
        patched.setattr(collect, "hook_activations", _raising(number, collect.hook_activations, after=2))
        for command, *args in (("samples", *SAMPLES), ("report", "--tokens", 1500)):
            code, said = call(command, model, *args)
            assert code == 128 + number
            assert "tokens, as asked; they are kept in" in said
            assert f"the same again: saelens-matryoshka {command} {model} --tokens 1500" in said
            assert "Traceback" not in said
            assert _files(model) - before == {"samples.unfinished", ".samples.lock"}
    code, said = call("samples", model, *SAMPLES)
    assert code == 0, said
    assert "is of other settings" in said, "report has its own"
    assert "n_top 20, not 3" in said
    assert _files(model) - before == {"samples", "samples/samples.safetensors", ".samples.lock"}
    found, whole = Samples.load(model / "samples"), Samples.load(tmp_path / "whole")
    assert found.top_of(3) == whole.top_of(3)


def test_the_same_call_after_an_interruption_gives_the_samples_of_one_without(
    model: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("samples", model, *SAMPLES, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(
            collect, "hook_activations", _raising(signal.SIGINT, collect.hook_activations, after=2)
        )
        assert call("samples", model, *SAMPLES)[0] == 130
    code, said = call("samples", model, *SAMPLES)
    assert code == 0
    assert "Going on with" in said
    found, whole = Samples.load(model / "samples"), Samples.load(tmp_path / "whole")
    for latent in range(found.d_sae):
        assert found.top_of(latent) == whole.top_of(latent)
        assert found.intervals_of(latent) == whole.intervals_of(latent)


@pytest.mark.parametrize(
    ("command", "number", "n_batches"),
    # in the second pass; in the first pass of the second model
    [("eval", signal.SIGINT, 5), ("eval", signal.SIGTERM, 5), ("compare", signal.SIGTERM, 8)],
)
def test_the_same_call_after_an_interruption_gives_the_numbers_of_an_evaluation_without(
    command: str,
    number: int,
    n_batches: int,
    model: Path,
    call: Any,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random_sae(120).save_model(tmp_path / "second")
    models = [model] if command == "eval" else [model, tmp_path / "second"]
    args = (command, *models, "--tokens", 700, "--ce-tokens", 300, "--json")
    handler = signal.getsignal(signal.SIGTERM)
    assert call(*args, tmp_path / "whole.json")[0] == 0
    before = _files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "_evaluated", _raising(number, Evaluation._evaluated, after=n_batches))
        code, said = call(*args, tmp_path / "numbers.json")
    assert code == 128 + number
    (kept,) = cache.iterdir()
    assert f"tokens, as asked; they are kept in {kept}" in said
    assert f"the same again: saelens-matryoshka {command} {model}" in said
    assert "Traceback" not in said
    new = {path for path in _files(tmp_path) - before if (tmp_path / path).is_file()}
    assert new == {kept.relative_to(tmp_path).as_posix()}
    assert signal.getsignal(signal.SIGTERM) is handler
    code, said = call(*args, tmp_path / "numbers.json")
    assert code == 0, said
    assert f"Going on with {kept}" in said
    assert (tmp_path / "numbers.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("change", "said_so"),
    [
        (("--tokens", 800), "n_tokens 700, not 800"),
        (("--skip", 1), "from document 1 on"),
        (("--special-tokens",), "exclude_special_tokens True, not False"),
        ("weights", "other weights"),
        ("config", "another configuration"),
    ],
    ids=str,
)
def test_an_evaluation_of_other_settings_or_weights_begins_anew_and_says_so(
    change: Any, said_so: str, model: Path, call: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args: tuple[Any, ...] = ("eval", model, "--tokens", 700, "--ce-tokens", 0, "--json")
    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "_evaluated", _raising(signal.SIGINT, Evaluation._evaluated))
        assert call(*args)[0] == 130
    (kept,) = cache.iterdir()
    sae = random_sae()
    if change == "weights":
        sae.b_dec.data += 0.1
    elif change == "config":
        sae.cfg.metadata.matryoshka_widths = [96]
    if isinstance(change, str):
        sae.save_model(model)
    else:
        args += change
    code, said = call(*args)
    assert code == 0
    assert f"{kept} is of other settings (" in said
    assert said_so in said
    assert "starting anew" in said
    assert not list(cache.iterdir())


def test_an_evaluation_that_is_ended_at_once_says_how_to_go_on(
    model: Path, call: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sm, "evaluate", _raising(signal.SIGTERM, sm.evaluate))
    code, said = call("eval", model, "--tokens", 300)
    assert code == 143
    assert "Interrupted. Call it again: it goes on from what was kept last, if anything was." in said
    assert "Traceback" not in said
    assert not cache.exists()


TRAIN = ("train", "--preset", "tiny", "--d_sae", 64, "-k", 4, "--name", "x")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_while_it_loads_leaves_nothing_and_says_so(
    number: int, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module, name in ((settings, "resolve"), (training, "_runner")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, _raising(number, getattr(module, name)))
            code, said = call(*TRAIN)
        assert code == 128 + number
        assert said.count("Interrupted. Nothing has been written: call it again.") == 1
        assert "Traceback" not in said
        assert _files(tmp_path) == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_outside_of_its_steps_says_how_to_go_on(
    number: int, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = "train --resume results/tiny/mlp-2/x"
    monkeypatch.setattr(training, "_runner", lambda *_: None)
    monkeypatch.setattr(training, "_run", _raising(number, training._run))
    for command in (TRAIN, again.split()):
        code, said = call(*command)
        assert code == 128 + number
        assert f"Interrupted. To go on: saelens-matryoshka {again}\n" in said
        assert "Traceback" not in said
    assert "Going on with results/tiny/mlp-2/x, from its start: it has no checkpoint\n" in said


def test_an_export_leaves_a_whole_folder_or_none(
    model: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _files(tmp_path)
    monkeypatch.setattr(export, "write_card", _raising(signal.SIGTERM, export.write_card))
    code, said = call("export", model, "--to", "saelens", "--out", tmp_path / "out")
    assert code == 143
    assert "whole or not at all" in said
    assert _files(tmp_path) == before


def _slowly(module: ModuleType, *arguments: str) -> None:
    """The command, which says when it is at work and then takes its time."""
    function = module.hook_activations

    def slow(*args: Any, **kwargs: Any) -> Any:
        print("at work", flush=True)
        time.sleep(5)
        return function(*args, **kwargs)

    module.hook_activations = slow  # type: ignore[attr-defined]
    sys.argv = ["saelens-matryoshka", *arguments]
    main()


@pytest.mark.parametrize(
    ("command", "module", "leaves"),
    [
        ("samples", collect, "model/samples.unfinished"),
        ("eval", evaluator, "assets/saelens_matryoshka/eval-*.unfinished"),
    ],
)
def test_a_signal_from_outside_ends_the_process_with_its_code(
    command: str, module: ModuleType, leaves: str, model: Path, tmp_path: Path, tmp_path_factory: Any
) -> None:
    before, log = _files(tmp_path), tmp_path_factory.mktemp("said") / "log"
    with log.open("w") as file:
        process = start(
            _slowly, module, command, str(model), "--tokens", "1500",
            cwd=tmp_path, out=file.fileno(), err=file.fileno(),
        )  # fmt: skip
    try:
        while "at work" not in log.read_text():
            assert process.is_alive(), f"it ended before it was at work: {log.read_text()}"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=60)
    finally:
        process.kill()
    said = log.read_text()
    assert process.exitcode == 130, said
    assert "Stopped after" in said
    assert "Traceback" not in said
    new = (path for path in _files(tmp_path) - before if (tmp_path / path).is_file())
    (left,) = (path for path in new if not path.endswith(".lock"))
    assert fnmatch(left, leaves)
