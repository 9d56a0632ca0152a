"""Measure dictionaries with `sm.evaluate`, and choose between candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_lens import SAE

import saelens_matryoshka as sm
from benchmarks.quality.activations import Activations


@dataclass(frozen=True)
class Row:
    """One prefix of one contestant, as the inference model, on the held-out tokens."""

    task: str
    contestant: str
    width: int
    seed: int
    settings: str
    """what was chosen for it, e.g. its learning rate"""
    l0: float
    fvu: float
    dead: float
    """share of latents that never fired on the held-out tokens"""
    ce_recovered: float | None
    """against zero ablation"""
    ce_recovered_mean: float | None
    """against mean ablation"""
    rival_of: str | None = None
    """name of the nested contestant whose prefix of this width it is the fair rival of"""


class Judge:
    """The one way in which every contestant is measured."""

    def __init__(self, model: Any, activations: Activations, *, n_ce_tokens: int) -> None:
        self.model, self.activations, self.n_ce_tokens = model, activations, n_ce_tokens

    def validate(self, sae: SAE[Any]) -> sm.EvalResult:
        """On the validation tokens: for choosing, and for the L0 a rival is trained at."""
        tokens = self.activations.validation
        return sm.evaluate(sae, self.model, tokens, n_tokens=tokens.numel(), n_ce_tokens=0)

    def measure(
        self,
        sae: SAE[Any],
        *,
        task: str,
        contestant: str,
        seed: int,
        settings: str,
        rival_of: str | None = None,
    ) -> list[Row]:
        """On the held-out tokens: what is reported, a row per prefix."""
        tokens = self.activations.held_out
        result = sm.evaluate(sae, self.model, tokens, n_tokens=tokens.numel(), n_ce_tokens=self.n_ce_tokens)
        return [
            Row(
                task=task,
                contestant=contestant,
                width=prefix.width,
                seed=seed,
                settings=settings,
                l0=prefix.l0,
                fvu=prefix.fvu,
                dead=prefix.dead_fraction,
                ce_recovered=prefix.ce_recovered,
                ce_recovered_mean=prefix.ce_recovered_mean,
                rival_of=rival_of,
            )
            for prefix in result.prefixes
        ]
