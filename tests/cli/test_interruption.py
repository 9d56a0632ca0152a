"""Ctrl-C and SIGTERM in the commands that take long: the exit code, what is said, and what is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import saelens_matryoshka as sm
import saelens_matryoshka.report.collect as collect
from saelens_matryoshka.cli import main
from saelens_matryoshka.formats import export
from saelens_matryoshka.report import Samples
from saelens_matryoshka.runs import settings, training
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
            assert _files(model) - before == {"samples.unfinished"}
    code, said = call("samples", model, *SAMPLES)
    assert code == 0, said
    assert "is of other settings" in said, "report has its own"
    assert "n_top 20, not 3" in said
    assert _files(model) - before == {"samples", "samples/samples.safetensors"}
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_says_that_nothing_is_kept(
    number: int, model: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, before = signal.getsignal(signal.SIGTERM), _files(tmp_path)
    for command in ("eval", "compare"):
        name = "evaluate" if command == "eval" else "compare"
        monkeypatch.setattr(sm, name, _raising(number, getattr(sm, name)))
        code, said = call(command, model, "--tokens", 300, "--json", tmp_path / "numbers.json")
        assert code == 128 + number
        (line,) = [line for line in said.splitlines() if "Interrupted" in line]
        assert "Nothing is kept of an evaluation that is not finished" in line
        assert "Traceback" not in said
        assert _files(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) is handler


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


AT_WORK = """
import time
from importlib import import_module
from saelens_matryoshka.cli import main

module = import_module({module!r})
function = module.hook_activations


def slow(*args, **kwargs):
    print("at work", flush=True)
    time.sleep(5)
    return function(*args, **kwargs)


module.hook_activations = slow
main()
"""


@pytest.mark.parametrize(
    ("command", "module", "says", "leaves"),
    [
        ("samples", "saelens_matryoshka.report.collect", "Stopped after", {"samples.unfinished"}),
        ("eval", "saelens_matryoshka.evaluation.evaluator", "Interrupted. ", set()),
    ],
)
def test_a_signal_from_outside_ends_the_process_with_its_code(
    command: str, module: str, says: str, leaves: set[str], model: Path
) -> None:
    before = _files(model)
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK.format(module=module), command, str(model), "--tokens", "1500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "at work\n":
            assert line, f"it ended before it was at work: {process.communicate()[1]}"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert says in said
    assert "Traceback" not in said
    assert _files(model) - before == leaves
