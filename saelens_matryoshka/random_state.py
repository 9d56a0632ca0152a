"""The random states of a process, as tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of torch (every device), numpy and Python: tensors, and what JSON can hold."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{index}"] = state
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors["random.numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, numbers, gauss = random.getstate()
    return tensors, {"numpy": [kind, *rest], "python": [version, list(numbers), gauss]}


def set_random_state(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Go back to the states that `random_state` gave. Those of devices that are not here are left out."""
    torch.set_rng_state(tensors["random.torch"])
    for index in range(torch.cuda.device_count()):
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)
    kind, position, has_gauss, gauss = values["numpy"]
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))
    version, numbers, next_gauss = values["python"]
    random.setstate((version, tuple(numbers), next_gauss))
