"""A small SAE of the embedded model, and its samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer

from saelens_matryoshka.report import Samples, collect_samples

D_SAE, CONTEXT = 96, 24


def random_sae(d_sae: int = D_SAE, hook: str = "blocks.1.hook_resid_post") -> JumpReLUSAE:
    """Random directions, with thresholds that leave most latents silent on a token; the last is dead."""
    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=d_sae))
    directions = torch.randn(d_sae, 128, generator=generator)
    sae.W_dec.data = directions / directions.norm(dim=1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    sae.threshold.data.fill_(2.0)
    sae.threshold.data[-1] = 1e6
    widths = [d_sae // 6, d_sae // 2, d_sae]
    sae.cfg.metadata = SAEMetadata(
        model_name="tiny", hook_name=hook, matryoshka_widths=widths, context_size=CONTEXT
    )
    return sae


@pytest.fixture(scope="session")
def sae() -> JumpReLUSAE:
    """Shared: do not change it."""
    return random_sae()


@pytest.fixture(scope="session")
def prompts() -> torch.Tensor:
    """60 prompts of random tokens, which start with BOS and have other special tokens inside."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 4000, (60, CONTEXT), generator=generator)
    tokens[:, 0] = 2
    tokens[::7, 11] = 1
    return tokens


@pytest.fixture(scope="session")
def samples(sae: JumpReLUSAE, tiny_model: HookedTransformer, prompts: torch.Tensor) -> Samples:
    """Of all prompts."""
    return collected(sae, tiny_model, prompts)


def collected(sae: Any, model: Any, prompts: torch.Tensor, **settings: Any) -> Samples:
    """Samples with small settings."""
    defaults = {"n_top": 5, "per_interval": 2, "before": 4, "after": 3, "n_tokens": prompts.numel()}
    return collect_samples(sae, model, prompts, **{**defaults, **settings})
