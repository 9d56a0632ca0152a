"""Environments of their own for tools whose version pins conflict with this package's.

One session per tool: it installs the tool beside this package and runs the tests that need it. `make
test-interop` runs them all; `nox -s NAME` one of them; `nox -l` lists them.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def _install(session: nox.Session, *tools: str) -> None:
    """This package and the tool in one environment, torch first: a tool would pull in builds for CUDA."""
    session.install("--constraint", "constraints.txt", "torch")
    session.install("--constraint", "constraints.txt", "--editable", ".", "pytest", *tools)


@nox.session
def sparsify(session: nox.Session) -> None:
    """EleutherAI's sparsify reads what we write, and the other way round."""
    _install(session, "eai-sparsify")
    session.run("pytest", "tests/interop/test_sparsify.py", *session.posargs)


@nox.session
def dictionary_learning(session: nox.Session) -> None:
    """dictionary_learning reads what we write, and the other way round."""
    _install(session, "dictionary-learning")
    # Its nnsight asks for torchvision, whose registry build does not load beside a CPU build of torch.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
    session.run("pytest", "tests/interop/test_dictionary_learning.py", *session.posargs)


@nox.session
def circuit_tracer(session: nox.Session) -> None:
    """circuit-tracer reads what we write and the other way round, up to an attribution graph."""
    # circuit-tracer 0.5.0 does not work with the module layout of nnsight 0.8.
    _install(session, "circuit-tracer", "nnsight<0.8")
    session.run("pytest", "tests/interop/test_circuit_tracer.py", *session.posargs)
