"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """Processor or GPU, threads and versions."""
    described = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for package in ("torch", "sae-lens", "transformer-lens", "saelens-matryoshka"):
        described[package] = version(package)
    return described


def peak_resident() -> int:
    """Bytes of resident memory that this process had at the most."""
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere, and in Linux's getrusage, a process begins with its parent's
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()
