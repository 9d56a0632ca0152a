"""Environments of their own: for the oldest releases of what this package needs, and for tools whose version
pins conflict with its own.

One session per tool: it installs the tool beside this package and runs the tests that need it. `make
test-interop` runs them all; `nox -s NAME` one of them; `nox -l` lists them. The sessions of
`benchmarks/quality` run only when it calls them.
"""

import os
import re
from pathlib import Path

import nox

os.environ.pop("PYTHONPATH", None)  # what lies there would count as installed

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("--constraint", "constraints.txt")
SPARSIFY = "eai-sparsify==1.3.3"
DICTIONARY_LEARNING = "dictionary-learning==0.1.0"


def _install(session: nox.Session, *tools: str) -> None:
    """This package and the tool in one environment, torch first: a tool would pull in builds for CUDA."""
    session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, "--editable", ".", "pytest", "hypothesis", *tools)


def _without_torchvision(session: nox.Session) -> None:
    """It comes along unneeded, and transformers fails to import beside one built for another torch."""
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")


def _oldest(session: nox.Session, *but: str) -> Path:
    """Constraints to the oldest releases that pyproject.toml allows of what this package needs."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["plots"]]
    oldest = (re.match(r"([\w-]+)>=([\w.]+)", need) for need in needs)
    file = Path(session.create_tmp(), "oldest.txt")
    file.write_text("".join(f"{need[1]}=={need[2]}\n" for need in oldest if need and need[1] not in but))
    return file


@nox.session
def oldest(session: nox.Session) -> None:
    """The quick tests with the oldest releases that pyproject.toml allows, but for torch."""
    session.install(*CONSTRAINTS, "torch")
    oldest = ("--constraint", str(_oldest(session, "torch")))
    session.install(*CONSTRAINTS, *oldest, "--editable", ".[plots]", "pytest", "pytest-xdist", "hypothesis")
    session.run("pytest", *(session.posargs or ["--numprocesses=logical", "-m", "not slow"]))


@nox.session(default=False)
def oldest_torch(session: nox.Session) -> None:
    """The same with the oldest torch, whose build for CUDA is several gigabytes."""
    session.install("--constraint", str(_oldest(session)), "--editable", ".[plots]", "pytest", "hypothesis")
    session.run("pytest", *(session.posargs or ["-m", "not slow"]))


@nox.session
def sae_bench(session: nox.Session) -> None:
    """SAEBench, whose pins on datasets, numpy and torchvision are stricter than its code."""
    session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, "--editable", ".[saebench]", "pytest", "hypothesis")
    session.install("--no-deps", "sae-bench==0.6.0", "sae-probes==0.4.2", "xgboost>=3.0.2,<4")
    session.run("pytest", *(session.posargs or ["tests/saebench"]))


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Hostile files for every importer, made up by libFuzzer: `nox -s fuzz -- --seconds 600`."""
    _install(session, "atheris>=3.0")
    session.run("python", "-m", "benchmarks.fuzz", *session.posargs)


@nox.session
def sparsify(session: nox.Session) -> None:
    """EleutherAI's sparsify reads what we write, and the other way round."""
    _install(session, SPARSIFY)
    session.run("pytest", "tests/interop/test_sparsify.py", *session.posargs)


@nox.session
def dictionary_learning(session: nox.Session) -> None:
    """dictionary_learning reads what we write, and the other way round."""
    _install(session, DICTIONARY_LEARNING)
    _without_torchvision(session)
    session.run("pytest", "tests/interop/test_dictionary_learning.py", *session.posargs)


@nox.session
def circuit_tracer(session: nox.Session) -> None:
    """circuit-tracer reads what we write and the other way round, up to an attribution graph."""
    # circuit-tracer 0.5.0 does not work with the module layout of nnsight 0.8.
    _install(session, "circuit-tracer", "nnsight<0.8")
    session.run("pytest", "tests/interop/test_circuit_tracer.py", *session.posargs)


@nox.session
def sae_dashboard(session: nox.Session) -> None:
    """SAEDashboard's own classes read the batches for Neuronpedia that we write; its pins contradict ours."""
    _install(session)
    session.install("--no-deps", "sae-dashboard==0.8.0")
    session.run("pytest", "tests/report/test_formats.py", *session.posargs)


@nox.session(default=False)
def quality_sparsify(session: nox.Session) -> None:
    """Train sparsify's contestants of benchmarks/quality, which calls this."""
    session.install(*CONSTRAINTS, "torch", SPARSIFY)
    session.run("python", "benchmarks/quality/peer_scripts/train_sparsify.py", *session.posargs)


@nox.session(default=False)
def quality_dictionary_learning(session: nox.Session) -> None:
    """Train dictionary_learning's contestants of benchmarks/quality, which calls this."""
    session.install(*CONSTRAINTS, "torch", DICTIONARY_LEARNING)
    _without_torchvision(session)
    session.run("python", "benchmarks/quality/peer_scripts/train_dictionary_learning.py", *session.posargs)
