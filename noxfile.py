"""Environments of their own for tools whose version pins conflict with this package's.

One session per tool: it installs the tool beside this package and runs the tests that need it. `make
test-interop` runs them all; `nox -s NAME` one of them; `nox -l` lists them.
"""

import os

import nox

os.environ.pop("PYTHONPATH", None)  # what lies there would count as installed

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("--constraint", "constraints.txt")


@nox.session(default=False)
def quality_sparsify(session: nox.Session) -> None:
    """Train sparsify's contestants of benchmarks/quality, which calls this."""
    session.install(*CONSTRAINTS, "torch", "eai-sparsify==1.3.3")
    session.run("python", "benchmarks/quality/peer_scripts/train_sparsify.py", *session.posargs)


@nox.session(default=False)
def quality_dictionary_learning(session: nox.Session) -> None:
    """Train dictionary_learning's contestants of benchmarks/quality, which calls this."""
    session.install(*CONSTRAINTS, "torch", "dictionary-learning==0.1.0")
    # It comes along unneeded, and transformers fails to import beside one built for another torch.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
    session.run("python", "benchmarks/quality/peer_scripts/train_dictionary_learning.py", *session.posargs)
