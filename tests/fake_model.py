"""A language model whose activations are known functions of token and position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformer_lens.hook_points import HookedRootModule, HookPoint

N_VOCAB = 1000


class FakeModel(HookedRootModule):
    """Source `[token, position]` at "hook_source", target `[token·10⁴ + position]` at "hook_target"."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_source = HookPoint()
        self.hook_target = HookPoint()
        self.W_E = torch.nn.Parameter(torch.zeros(N_VOCAB, 2))
        self.cfg = SimpleNamespace(device="cpu")
        self.tokenizer = SimpleNamespace(
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            sep_token_id=None,
            decoder_start_token_id=None,
        )
        self.n_forward_passes = 0
        self.setup()

    def forward(self, tokens: torch.Tensor, **_: Any) -> torch.Tensor:
        self.n_forward_passes += 1
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        self.hook_source(torch.stack([tokens, positions], dim=-1).float())
        self.hook_target((tokens * 10_000 + positions).float()[..., None])
        return torch.zeros(*tokens.shape, N_VOCAB)
