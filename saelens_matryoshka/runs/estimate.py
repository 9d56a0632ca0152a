"""What a training run will take, before anything is downloaded: memory on every device, and time.

from saelens_matryoshka.runs.estimate import estimate

print(estimate(cfg).to_json())
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from sae_lens import LanguageModelSAERunnerConfig

from saelens_matryoshka.architectures.config import MatryoshkaTrainingConfig
from saelens_matryoshka.parallel import Mesh
from saelens_matryoshka.parallel.data import require_divisible
from saelens_matryoshka.runs.advice import Advice, advise
from saelens_matryoshka.runs.language_models import model_shape
from saelens_matryoshka.runs.memory import (
    ALONE,
    Need,
    by_phase,
    device_name,
    memory_needs,
    require_room,
    store_rows,
    trace_forward,
)
from saelens_matryoshka.runs.timing import Time, measure_time

_GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What a run takes on one device."""

    name: str
    """cpu, or cuda:0"""
    phases: dict[str, int]
    """bytes while the run does each thing"""
    parts: dict[str, int]
    """bytes of what is there at the peak"""
    available: int | None
    """bytes that are free, None if it is not known"""

    @property
    def peak(self) -> int:
        """Bytes at the worst of times."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """What the run does then."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def fits(self) -> bool | None:
        """Whether that is available, None if it is not known."""
        return None if self.available is None else self.peak <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: bytes."""
        return {
            "name": self.name,
            "peak_bytes": self.peak,
            "peak_phase": self.peak_phase,
            "available_bytes": self.available,
            "fits": self.fits,
            "phases": self.phases,
            "parts": self.parts,
        }


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    model_name: str
    n_parameters: int
    """of the language model"""
    devices: list[Device]
    time: Time | None
    """None if it was not asked for, or the run's device is not in this machine"""
    advice: list[Advice]
    """single changes that help where it does not fit, the best first; empty if it fits"""
    mesh: Mesh = ALONE
    """the processes that train together, of which the memory is what one takes"""

    @property
    def fits(self) -> bool | None:
        """Whether it fits everywhere, None if that is not known of some device."""
        answers = [device.fits for device in self.devices]
        return False if False in answers else None if None in answers else True

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: bytes and seconds."""
        return {
            "model_name": self.model_name,
            "n_parameters": self.n_parameters,
            "processes": self.mesh.size,
            "shards": self.mesh.shards,
            "fits": self.fits,
            "devices": [device.to_dict() for device in self.devices],
            "time": None if self.time is None else self.time.to_dict(),
            "advice": [one.to_dict() for one in self.advice],
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def tables(self) -> Group:
        """For rich; fits 80 columns."""
        shown: list[Any] = [self._processes_line()]
        for device in self.devices:
            shown += [_device_table(device), _verdict(device)]
        shown += [self._advice_line(), self._time_line()]
        return Group(*[one for one in shown if one is not None])

    def _processes_line(self) -> str | None:
        if self.mesh.size == 1:
            return None
        has = "a copy" if self.mesh.shards == 1 else f"1/{self.mesh.shards}"
        return f"[bold]Each of {self.mesh.size} processes[/], which has {has} of the dictionary, takes:\n"

    def _advice_line(self) -> str | None:
        if self.fits is not False:
            return None
        if not self.advice:
            return "[yellow]No single setting makes it much smaller:[/] take a smaller model or d_sae.\n"
        best = self.advice[0]
        after = ", ".join(f"{_size(n)} on {name}" for name, n in best.peaks.items())
        word = "It would fit with" if best.fits else "What helps most, though not enough:"
        return f"[bold]{word} {escape(best.flags)}[/]: {after}.\n"

    def _time_line(self) -> str:
        if self.time is None:
            return "Time: not measured."
        t = self.time
        parts = f"step {_seconds(t.step)}, language model {_seconds(t.language_model_per_step)}"
        parts += f", buffer {_seconds(t.moving_per_step)}"
        how = "measured smaller, extrapolated" if t.scaled else "measured"
        return (
            f"[bold]Time: {_duration(t.total)}[/], {t.tokens_per_second:,.0f} tokens/s: "
            f"{_duration(t.filling)} before the first step,\n"
            f"then {t.n_steps:,} steps of {_seconds(t.per_step)} ({parts};\n"
            f"{how} on this machine as it is now)"
        )


def estimate(
    *cfgs: LanguageModelSAERunnerConfig[Any],
    available: Mapping[str, int] | None = None,
    with_time: bool = True,
    mesh: Mesh = ALONE,
) -> Estimate:
    """Memory and time of a run of SAELens's runner, without its weights and its text.

    Args:
        *cfgs: A runner config whose `sae` is ours; or several, of dictionaries that are trained in lockstep.
        available: Bytes per device ("cpu", "cuda"), for another machine than this one. What is not given is
            looked up, if the device is in this machine.
        with_time: Calibrate the time. It takes some seconds. Not of several processes: what they say to each
            other is not measured.
        mesh: The processes that train together, e.g. `Mesh(shards=8)`. The memory is that of one of them.

    Raises:
        ValueError: the shape of the language model is not known, the config does not fit it, or the batch
            cannot be divided among the processes or served from the buffer.
    """
    for cfg in cfgs:
        if not isinstance(cfg.sae, MatryoshkaTrainingConfig):
            raise ValueError(
                f"architecture={cfg.sae.architecture()!r}: the estimate knows this package's training step, "
                "not SAELens's. Choose one of the matryoshka_ architectures."
            )
    cfg = cfgs[0]
    require_divisible(cfg.train_batch_size_tokens, mesh.size)
    require_room(cfg, mesh.size)
    shape = model_shape(cfg)
    if cfg.context_size > shape.n_ctx:
        raise ValueError(
            f"context_size={cfg.context_size} is more than the {shape.n_ctx} tokens {cfg.model_name!r} takes."
        )
    trace = trace_forward(cfgs, shape)
    needs = memory_needs(cfgs, trace, mesh)
    names = sorted({need.device for need in needs}, reverse=True)
    limits = {name: _available(name, available or {}) for name in names}
    devices = [_device(name, needs, limits[name]) for name in names]
    advice = []
    if any(device.fits is False for device in devices):
        advice = advise(cfgs, trace, shape, limits, mesh)
    seconds = None
    with_time = with_time and mesh.size == 1
    if with_time and all(_is_here(device) for device in (cfg.device, cfg.llm_device, cfg.act_store_device)):
        free = (
            psutil.virtual_memory().available if device_name(cfg.device) == "cpu" else _free_cuda(cfg.device)
        )
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices about settings are not repeated
            seconds = measure_time(cfgs, shape, store_rows(cfg), budget=free // 3)
    return Estimate(cfg.model_name, trace.n_parameters, devices, seconds, advice, mesh)


def _device(name: str, needs: list[Need], available: int | None) -> Device:
    phases = by_phase(needs, name)
    worst = max(phases, key=lambda phase: phases[phase])
    parts: dict[str, int] = {}
    for need in needs:
        if need.device == name and worst in need.phases:
            parts[need.what] = parts.get(need.what, 0) + need.n_bytes
    return Device(name, phases, parts, available)


def _available(name: str, given: Mapping[str, int]) -> int | None:
    for key in (name, name.partition(":")[0]):
        if key in given:
            return given[key]
    if name == "cpu":
        # this process's own share is in the estimate
        free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
        return min(free, _cgroup_limit() or free)
    return _free_cuda(name) if _is_here(name) else None


def _cgroup_limit() -> int | None:
    """What a container may take, if it is limited."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return None


def _free_cuda(name: Any) -> int:
    return torch.cuda.mem_get_info(torch.device(name))[0]


def _is_here(device: Any) -> bool:
    if device is None or torch.device(device).type == "cpu":
        return True
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return False
    return (torch.device(device).index or 0) < torch.cuda.device_count()


# ---- what is shown


def _device_table(device: Device) -> Table:
    title = f"{device.name}: {_size(device.peak)}, at its most while {device.peak_phase}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title_justify="left")
    table.add_column("at the peak", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("in each part of the run", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    parts = sorted(device.parts.items(), key=lambda part: -part[1])
    small = [n for _, n in parts if n < device.peak / 100]
    left = [(what, n) for what, n in parts if n >= device.peak / 100]
    if small:
        left.append(("the rest", sum(small)))
    right = list(device.phases.items())
    for i in range(max(len(left), len(right))):
        cells = [(what, _size(n)) for what, n in (left[i : i + 1] or [("", -1)])]
        cells += [(what, _size(n)) for what, n in (right[i : i + 1] or [("", -1)])]
        table.add_row(*[cell for pair in cells for cell in pair])
    return table


def _verdict(device: Device) -> str:
    if device.available is None:
        return "Whether that fits is not known: no such device is here. Give its --gpu-memory.\n"
    if device.fits:
        return f"[green]fits[/]: {_size(device.available)} available\n"
    missing = _size(device.peak - device.available)
    return f"[bold red]does not fit[/]: {_size(device.available)} available, {missing} too few\n"


def _size(n_bytes: int) -> str:
    if n_bytes < 0:
        return ""
    return f"{n_bytes / _GIB:,.1f} GiB" if n_bytes >= _GIB else f"{n_bytes / (1 << 20):,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
