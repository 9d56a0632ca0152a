"""Environments of their own for tools whose version pins conflict with this package's.

One session per tool: it installs the tool beside this package and runs the tests that need it. `make
test-interop` runs them all; `nox -s NAME` one of them; `nox -l` lists them.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
