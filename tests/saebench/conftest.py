"""Fixtures of the tests that run SAEBench; they skip where it is not installed."""

from __future__ import annotations

import pytest

from saelens_matryoshka.saebench.requirements import require_sae_bench


@pytest.fixture(scope="session")
def sae_bench() -> None:
    """Skips the test where SAEBench is not installed: `nox -s sae_bench` has an environment with it."""
    try:
        require_sae_bench()
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
