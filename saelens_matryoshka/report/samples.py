"""The samples of all latents: statistics, the strongest examples, and examples of every strength."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_FILE = "samples.safetensors"


class Example(NamedTuple):
    """One place where a latent fires, with the tokens around it."""

    value: float
    """the activation there"""
    prompt: int
    """which prompt"""
    position: int
    """of the token in its prompt"""
    tokens: list[int]
    """of the context"""
    activations: list[float]
    """of the latent on them; 0 on excluded tokens"""
    index: int
    """of the token among `tokens`"""


class Interval(NamedTuple):
    """An interval of activation values, with a uniform sample of the firings in it."""

    low: float
    """its lower end"""
    high: float
    """its upper end"""
    share: float
    """of the latent's firings"""
    examples: list[Example]
    """none where the latent never fires so"""


@dataclass
class Examples:
    """A fixed number of examples of every latent; the last ones may be missing."""

    positions: torch.Tensor
    """`[d_sae, n]` of the token, counted over all prompts; -1 where there is none"""
    values: torch.Tensor
    """`[d_sae, n]` activation there"""
    windows: torch.Tensor
    """`[d_sae, n, before + 1 + after]` activations around it, 0 beyond the prompt's ends"""


@dataclass
class Samples:
    """What `collect_samples` found."""

    tokens: torch.Tensor
    """`[prompts, context_size]`, int32"""
    n_tokens: int
    """tokens counted; excluded ones are not among them"""
    fired: torch.Tensor
    """`[d_sae]` on how many tokens each latent fires"""
    sums: torch.Tensor
    """`[d_sae]` sum of its activations, float64"""
    largest: torch.Tensor
    """`[d_sae]` largest activation, 0 for a dead latent"""
    smallest: torch.Tensor
    """`[d_sae]` smallest positive activation, 0 for a dead latent"""
    scale: torch.Tensor
    """`[d_sae]` the span of histogram and intervals is [0, scale]"""
    histogram: torch.Tensor
    """`[d_sae, n_bins]` firings by activation, in equal bins"""
    top: Examples
    """the strongest, one per prompt, strongest first"""
    intervals: Examples
    """`n_intervals` times `per_interval`: uniform samples of the firings in equal intervals of the span"""
    n_intervals: int
    """how many"""
    before: int
    """tokens of an example before the one it is about"""
    after: int
    """and after it"""
    about: dict[str, Any]
    """what they were collected from, and how"""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.fired)

    @property
    def density(self) -> torch.Tensor:
        """`[d_sae]` share of the tokens each latent fires on, float64."""
        return self.fired.double() / self.n_tokens

    def top_of(self, latent: int) -> list[Example]:
        """A latent's strongest examples, one per prompt, strongest first."""
        return self._examples(self.top, latent, slice(None))

    def intervals_of(self, latent: int) -> list[Interval]:
        """A latent's intervals up to its largest activation, the highest first."""
        width = self.scale[latent].item() / self.n_intervals
        largest, fired = self.largest[latent].item(), int(self.fired[latent])
        per_interval = self.intervals.positions.shape[1] // self.n_intervals
        shares = self.histogram[latent].view(self.n_intervals, -1).sum(dim=1).double() / max(fired, 1)
        return [
            Interval(
                i * width,
                min((i + 1) * width, largest),
                shares[i].item(),
                self._examples(self.intervals, latent, slice(i * per_interval, (i + 1) * per_interval)),
            )
            for i in reversed(range(self.n_intervals))
            if fired and i * width <= largest  # an interval holds its lower end
        ]

    def _examples(self, examples: Examples, latent: int, which: slice) -> list[Example]:
        context = self.tokens.shape[1]
        found = []
        for position, value, window in zip(
            examples.positions[latent, which].tolist(),
            examples.values[latent, which].tolist(),
            examples.windows[latent, which].tolist(),
            strict=True,
        ):
            if position < 0:
                continue
            prompt, at = divmod(position, context)
            start, stop = max(at - self.before, 0), min(at + self.after + 1, context)
            offset = start - (at - self.before)
            tokens = self.tokens[prompt, start:stop].tolist()
            found.append(
                Example(value, prompt, at, tokens, window[offset : offset + len(tokens)], at - start)
            )
        return found

    def save(self, folder: Path) -> None:
        """Write them into a folder that exists, for `load`."""
        tensors, plain = {}, {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                tensors[field.name] = value
            elif isinstance(value, Examples):
                tensors |= {f"{field.name}.{f.name}": getattr(value, f.name) for f in fields(Examples)}
            else:
                plain[field.name] = value
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / _FILE, metadata={"samples": json.dumps(plain)})

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """Read what `save` has written.

        Raises:
            ValueError: it is not there, or is something else.
        """
        path = folder / _FILE
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} holds no samples: there is no {_FILE} in it.")
        try:
            with safe_open(path, "pt") as file:
                values: dict[str, Any] = json.loads((file.metadata() or {})["samples"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name in ("top", "intervals"):
                parts = {f.name: tensors.pop(f"{name}.{f.name}") for f in fields(Examples)}
                values[name] = Examples(**parts)
            return cls(**values, **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no samples that can be read: {error}.") from None


def has_samples(folder: Path) -> bool:
    """Whether a folder holds what `Samples.save` writes."""
    return (folder / _FILE).is_file()
