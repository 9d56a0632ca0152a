"""Hashes that tell whether a result on disk is of the same weights, data and settings, and what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

_SHOWN = {
    "weights": "other weights",
    "config": "another configuration",
    "model_weights": "other weights of the language model",
}
"""of what is compared by its hash, how a difference is told"""


def hash_of(value: Any) -> str:
    """Of anything JSON can write; of the rest, its `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_of_file(path: Path) -> str:
    """SHA-256 of its content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_of_weights(sae: SAE[Any]) -> str:
    """Of an SAE's weights: a result of others is not taken for its own."""
    return hash_of_tensors(sae.state_dict())[:16]


def hash_of_model(model: Any) -> str:
    """Of the ends of every parameter: enough to tell one checkpoint of a language model from another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(ends.numpy().tobytes())
    return digest.hexdigest()


def differences(found: dict[str, Any], settings: dict[str, Any]) -> str:
    """In words, which of the settings were others; empty if none."""
    return ", ".join(
        _SHOWN.get(name, f"{name} {found.get(name)!r}, not {value!r}")
        for name, value in settings.items()
        if found.get(name) != value
    )
