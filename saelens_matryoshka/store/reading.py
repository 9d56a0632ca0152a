"""What one dictionary reads of activations of many hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig

from saelens_matryoshka.sites import Site


@dataclass(frozen=True)
class Reading:
    """A source, and for a transcoder a target."""

    source: Site
    target_hook: str | None = None
    """None: an SAE's target is its source"""
    columns: slice | None = None
    """of the source's hook: one head's, where `hook_head_index` names it"""

    @property
    def hooks(self) -> list[str]:
        """The hooks that are read."""
        target = [] if self.target_hook is None else [self.target_hook]
        return list(dict.fromkeys([self.source.hook_name, *target]))

    def __call__(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The batch that is trained on: `[*batch, d_in]`, or `[source | target]`, `[*batch, d_in + d_out]`.

        Args:
            rows: By hook, `[*batch, width]`.
        """
        source = rows[self.source.hook_name]
        source = self.source(source if self.columns is None else source[..., self.columns])
        if self.target_hook is None:
            return source
        return torch.cat([source, rows[self.target_hook].to(source.device)], dim=-1)


def hooks_of(cfgs: Iterable[LanguageModelSAERunnerConfig[Any]]) -> list[str]:
    """The hooks that the dictionaries of runner configs read and predict, each once, in their order."""
    pairs = [(cfg.hook_name, getattr(cfg.sae, "hook_name_out", None)) for cfg in cfgs]
    return list(dict.fromkeys(hook for pair in pairs for hook in pair if hook))
