"""Environments of their own for tools whose version pins conflict with this package's.

One session per tool: it installs the tool beside this package and runs the tests that need it. `make
test-interop` runs them all; `nox -s NAME` one of them; `nox -l` lists them.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
def sae_bench(session: nox.Session) -> None:
    """SAEBench, whose pins on datasets, numpy and torchvision are stricter than its code."""
    session.install("--constraint", "constraints.txt", "torch")
    session.install("--constraint", "constraints.txt", "--editable", ".[saebench]", "pytest", "hypothesis")
    session.install("--no-deps", "sae-bench==0.6.0", "sae-probes==0.4.2", "xgboost>=3.0.2,<4")
    session.run("pytest", *(session.posargs or ["tests/saebench"]))
