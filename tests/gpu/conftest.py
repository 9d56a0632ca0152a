from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pretend_gpu import PretendGPUs


@pytest.fixture
def gpus() -> Iterator[PretendGPUs]:
    """Two pretended GPUs."""
    with PretendGPUs() as gpus:
        yield gpus
