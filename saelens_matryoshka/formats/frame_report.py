"""Which tensor was a transcoder trained to read?

Three tensors are called "the MLP's input", and on each of them a transcoder gives plausible numbers: the
residual before the norm, the normalised residual before the norm's gain, and the MLP's true input after it.
On the one it was trained on, it predicts its target best and fires as often as it was trained to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from sae_lens import SAE

from saelens_matryoshka.evaluation.metrics import FiringCounts, ReconstructionSums
from saelens_matryoshka.formats.coder import SparseCoder, from_saelens
from saelens_matryoshka.formats.frames import has_post_norm
from saelens_matryoshka.formats.thresholds import hook_rows
from saelens_matryoshka.sites import Site, block_hook, find_site, hook_names, norm_gain

# Closer than this, relatively, two candidates are not told apart by FVU, or by how far their L0 is from the
# one in training. (A gain near 1 changes little: then two frames are nearly one tensor.)
_FVU_MARGIN, _L0_MARGIN = 0.1, 0.15


@dataclass(frozen=True)
class Candidate:
    """A tensor a transcoder may have been trained on, and how it does there."""

    name: str
    """the hook, and the gain if any"""
    site: Site
    """hook, gain and offset"""
    fvu: float
    """of the transcoder's prediction of its target"""
    l0: float
    """active latents per token"""


@dataclass(frozen=True)
class FrameReport:
    """How a transcoder does on every candidate."""

    candidates: list[Candidate]
    """the best first"""
    declared: str
    """the hook its metadata name"""
    target: str
    """the hook it predicts"""
    n_tokens: int
    """tokens measured on"""
    trained_l0: float | None = None
    """active latents per token in training, where it is known"""

    @property
    def trained_on(self) -> list[Candidate]:
        """The tensors it may have been trained on, none if it predicts its target on none of them.

        Those with the lowest FVU; where several are close, those whose L0 is nearest the one in training.
        """
        best = self.candidates[0]
        if best.fvu >= 1:
            return []
        close = [c for c in self.candidates if c.fvu <= best.fvu * (1 + _FVU_MARGIN)]
        if not self.trained_l0:
            return close
        off = [abs(math.log(max(c.l0, 1e-9) / self.trained_l0)) for c in close]
        return [c for c, distance in zip(close, off, strict=True) if distance <= min(off) + _L0_MARGIN]

    @property
    def agrees(self) -> bool:
        """Whether the declared tensor is among those it may have been trained on."""
        return self.declared in [candidate.name for candidate in self.trained_on]

    @property
    def verdict(self) -> str:
        """In a sentence or two: which tensor it was trained on, against the declared one."""
        names = [candidate.name for candidate in self.trained_on]
        if not names:
            return (
                f"On none of them does it predict {self.target!r} better than the target's mean: it is "
                "of another layer, model or target."
            )
        trained = f"It was trained on {' or '.join(names)}"
        trained += " (too close to tell)" if len(names) > 1 else ""
        if self.agrees:
            return (
                f"{trained}, as it declares."
                if len(names) == 1
                else f"{trained}. It declares {self.declared}."
            )
        return f"{trained}, but it DECLARES {self.declared}: set hook_name to where it was trained."

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "target": self.target,
            "declared": self.declared,
            "trained_on": [candidate.name for candidate in self.trained_on],
            "agrees": self.agrees,
            "candidates": [{"name": c.name, "fvu": c.fvu, "l0": c.l0} for c in self.candidates],
            "n_tokens": self.n_tokens,
            "trained_l0": self.trained_l0,
        }

    def table(self) -> Table:
        """One row per candidate, for rich; fits 80 columns."""
        table = Table(title=f"Predicting {self.target}", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("tensor", overflow="fold")
        for heading in ("FVU", "L0"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for candidate in self.candidates:
            mark = "declared" if candidate.name == self.declared else ""
            table.add_row(candidate.name, f"{candidate.fvu:,.3f}", f"{candidate.l0:.1f}", mark)
        trained = f"; L0 in training {self.trained_l0:.4g}" if self.trained_l0 else ""
        table.caption = f"{self.n_tokens:,} tokens{trained}"
        return table


def candidate_sites(model: Any, layer: int, declared: str) -> dict[str, Site]:
    """The tensors that are confused for the MLP's input in one layer of a model, by name.

    Raises:
        ValueError: the model is of an unknown kind, or has no such layer.
    """
    hooks = set(hook_names(model))
    found: dict[str, Site] = {}
    for name in ("resid_mid", "ln2_normalized", "mlp_in"):
        try:
            site = find_site(model, layer, name)
        except ValueError as error:
            if "has no hook" not in str(error):
                raise
            continue
        found[site.hook_name if site.gain is None else f"{site.hook_name} × gain"] = site
    normalized = f"blocks.{layer}.ln2.hook_normalized"
    if normalized in hooks and f"{normalized} × gain" not in found:
        try:
            gain = norm_gain(model, normalized)
        except ValueError:  # folded: the hook is the true input
            pass
        else:
            found[f"{normalized} × gain"] = Site(normalized, *gain)
    if declared in hooks and declared not in found:
        found[declared] = Site(declared)
    return found


@torch.no_grad()
def measure_frames(
    sae: SAE[Any],
    model: Any,
    layer: int | None,
    dataset: Any,
    n_tokens: int = 4_096,
    trained_l0: float | None = None,
) -> FrameReport:
    """FVU and L0 of a transcoder on every tensor it may have been trained on.

    Args:
        sae: A transcoder of SAELens.
        model: The language model: HookedTransformer, TransformerBridge or HookedProxyLM.
        layer: Whose MLP; None: that of the transcoder's hook.
        dataset: As `sm.evaluate` takes it.
        n_tokens: About how many tokens to measure on.
        trained_l0: Active latents per token in training; None: what its metadata say, if they do.

    Raises:
        ValueError: it is no transcoder, the model has no such hook, or the dataset no tokens.
    """
    coder = from_saelens(sae)
    declared, target = coder.metadata.get("hook_name"), coder.metadata.get("hook_name_out")
    if not coder.is_transcoder or not declared or not target:
        raise ValueError(
            f"hook_name_out={target!r}: only of a transcoder, which predicts another tensor than it "
            "reads, can it be measured which tensor it was trained to read."
        )
    if trained_l0 is not None and not 0 < trained_l0 <= coder.d_sae:
        raise ValueError(f"l0={trained_l0:g} must be larger than 0 and at most d_sae={coder.d_sae}.")
    layer = _layer(declared) if layer is None else layer
    sites = candidate_sites(model, layer, declared)
    if declared == f"blocks.{layer}.mlp.hook_in" and declared not in sites:
        declared = f"blocks.{layer}.ln2.hook_normalized × gain"  # what a HookedTransformer has of it
    target = _target_on(model, target)
    fvu = {n: ReconstructionSums(1, coder.d_out, torch.device(sae.device)) for n in sites}
    firing = {n: FiringCounts(coder.d_sae, torch.device(sae.device)) for n in sites}
    hooks = list(dict.fromkeys([*(site.hook_name for site in sites.values()), target]))
    n_seen = 0
    for rows in hook_rows(coder, model, dataset, n_tokens, hooks=hooks):
        y = rows[target].to(sae.device, sae.dtype)
        n_seen += len(y)
        for name, site in sites.items():
            x = site(rows[site.hook_name]).to(sae.device, sae.dtype)
            if x.shape[-1] != coder.d_in:
                raise ValueError(
                    f"{name} has {x.shape[-1]} dimensions, and the transcoder reads {coder.d_in}."
                )
            firing[name].add(sae.encode(x))
            fvu[name].add(y, sae(x)[None])
    candidates = [
        Candidate(name, site, fvu[name].fvu().item(), firing[name].l0(coder.d_sae))
        for name, site in sites.items()
    ]
    candidates.sort(key=lambda candidate: candidate.fvu)
    return FrameReport(candidates, declared, target, n_seen, trained_l0 or _trained_l0(coder))


def _target_on(model: Any, target: str) -> str:
    """The target's name on this model: without a norm behind the MLP, `mlp.hook_out` is `hook_mlp_out`."""
    alias = target.replace(".mlp.hook_out", ".hook_mlp_out")
    known = hook_names(model)
    return alias if target not in known and alias in known and not has_post_norm(model) else target


def _trained_l0(coder: SparseCoder) -> float | None:
    l0 = coder.metadata.get("l0")
    return float(l0) if isinstance(l0, int | float) and l0 > 0 else coder.k or coder.trained_k


def _layer(hook: str) -> int:
    block = block_hook(hook)
    if block is None:
        raise ValueError(f"hook_name={hook!r} does not say which layer it is of: give --layer.")
    return block[0]
