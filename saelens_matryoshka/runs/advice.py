"""Which single setting helps most when a run does not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from saelens_matryoshka.parallel import Mesh
from saelens_matryoshka.runs.language_models import ModelShape, model_shape
from saelens_matryoshka.runs.memory import (
    ALONE,
    Configs,
    ForwardTrace,
    device_name,
    memory_needs,
    peak,
    trace_forward,
)

# A change that saves less than this share of what a device is asked for is not worth a word.
_WORTH = 0.02
# Settings that are halved until it fits, and how far at most.
_LEAST = {"store_batch_size_prompts": 1, "n_batches_in_buffer": 8, "train_batch_size_tokens": 512}


@dataclass(frozen=True)
class Advice:
    """One change of one setting, and what the run then takes."""

    settings: dict[str, Any]
    device: str
    """where it helps"""
    peaks: dict[str, int]
    """bytes at the peak, by device"""
    fits: bool
    saved: int
    """bytes on the device that was too small"""

    @property
    def flags(self) -> str:
        """As on the command line."""
        return " ".join(f"--{name} {_word(value)}" for name, value in self.settings.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the settings as flags too."""
        return {
            "device": self.device,
            "settings": self.settings,
            "flags": self.flags,
            "peak_bytes": self.peaks,
            "fits": self.fits,
        }


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return f"'{json.dumps(value)}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def advise(
    cfgs: Configs,
    trace: ForwardTrace,
    shape: ModelShape,
    limits: Mapping[str, int | None],
    mesh: Mesh = ALONE,
) -> list[Advice]:
    """Single changes, those that make it fit first: in the order in which they cost the least in quality.

    Args:
        cfgs: Of a run that does not fit, or of several in lockstep.
        trace: Of its language model.
        shape: Of its language model.
        limits: Bytes available by device.
        mesh: The processes that train together.
    """
    before = _peaks(cfgs, trace, mesh)
    room = {name: limit for name, limit in limits.items() if limit is not None}
    worst = max((name for name in before if name in room), key=lambda name: before[name] - room[name])
    found: list[Advice] = []
    for ladder in _candidates(cfgs[0]):
        best = None
        for settings in ladder:
            changed = [_changed(cfg, settings) for cfg in cfgs]
            tried = [cfg for cfg in changed if cfg is not None]
            if len(tried) < len(cfgs):
                break
            peaks = _peaks(tried, _trace_again(tried, cfgs[0], trace, shape), mesh)
            fits = all(n <= room.get(name, n) for name, n in peaks.items())
            saved = before[worst] - peaks.get(worst, 0)
            if saved >= _WORTH * before[worst] and (best is None or fits or saved > best.saved):
                best = Advice(settings, worst, peaks, fits, saved)
            if fits:
                break
        if best is not None:
            found.append(best)
    return [one for one in found if one.fits] + sorted(
        (one for one in found if not one.fits), key=lambda one: -one.saved
    )


def _peaks(cfgs: Configs, trace: ForwardTrace, mesh: Mesh) -> dict[str, int]:
    needs = memory_needs(cfgs, trace, mesh)
    return {name: peak(needs, name) for name in {need.device for need in needs}}


def _candidates(cfg: LanguageModelSAERunnerConfig[Any]) -> Iterator[list[dict[str, Any]]]:
    """Ladders of ever stronger changes of one setting; the first cost speed only, the last quality."""
    yield _halvings(cfg, "store_batch_size_prompts")
    if device_name(cfg.device) != "cpu":
        yield [{"act_store_device": "cpu"}]
    yield [{"autocast_lm": True}]
    yield [
        {"model_from_pretrained_kwargs": {**(cfg.model_from_pretrained_kwargs or {}), "dtype": "bfloat16"}}
    ]
    yield _halvings(cfg, "n_batches_in_buffer")
    yield [{"autocast": True}]
    yield _halvings(cfg, "train_batch_size_tokens")
    yield [{"dtype": "bfloat16"}]
    yield [{"sae.dtype": "bfloat16"}]
    if device_name(cfg.llm_device or cfg.device) != "cpu":
        yield [{"llm_device": "cpu"}]


def _halvings(cfg: LanguageModelSAERunnerConfig[Any], name: str) -> list[dict[str, Any]]:
    value, ladder = getattr(cfg, name) // 2, []
    while value >= _LEAST[name]:
        ladder.append({name: value})
        value //= 2
    return ladder


def _changed(
    cfg: LanguageModelSAERunnerConfig[Any], settings: dict[str, Any]
) -> LanguageModelSAERunnerConfig[Any] | None:
    """A copy with other settings; None if SAELens would refuse it or it is the same."""
    tried = copy.deepcopy(cfg)
    for name, value in settings.items():
        owner, name = (tried.sae, name[4:]) if name.startswith("sae.") else (tried, name)
        if getattr(owner, name) == value:
            return None
        setattr(owner, name, value)
    if tried.n_batches_in_buffer * tried.context_size < tried.train_batch_size_tokens:
        return None
    return tried


def _trace_again(
    changed: Configs,
    cfg: LanguageModelSAERunnerConfig[Any],
    trace: ForwardTrace,
    shape: ModelShape,
) -> ForwardTrace:
    """The trace of the changed config, computed again only where the change touches the language model."""
    tried = changed[0]
    if tried.model_from_pretrained_kwargs != cfg.model_from_pretrained_kwargs:
        return trace_forward(changed, model_shape(tried))
    if tried.autocast_lm != cfg.autocast_lm:
        return trace_forward(changed, shape)
    share = tried.store_batch_size_prompts / cfg.store_batch_size_prompts
    return trace._replace(peak=int(trace.peak * share))
