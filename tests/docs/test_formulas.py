"""The loss as `docs/concepts.md` writes it, computed from the page alone, is the one that is trained with."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

import saelens_matryoshka as sm

D_IN, D_OUT, D_SAE, N_TOKENS, K, WIDTHS = 8, 6, 40, 9, 3.5, [5, 16, 29, 40]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sae": (sm.MatryoshkaTrainingSAE, sm.MatryoshkaTrainingSAEConfig, {"apply_b_dec_to_input": True}),
    "transcoder": (
        sm.MatryoshkaTrainingTranscoder,
        sm.MatryoshkaTrainingTranscoderConfig,
        {"d_out": D_OUT, "hook_name_out": "blocks.0.hook_mlp_out"},
    ),
    "skip": (
        sm.MatryoshkaTrainingSkipTranscoder,
        sm.MatryoshkaTrainingSkipTranscoderConfig,
        {"d_out": D_OUT, "hook_name_out": "blocks.0.hook_mlp_out"},
    ),
}


@pytest.mark.parametrize("aux_k", [None, 2])
@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_the_guide(
    kind: str, rescale: bool, per_level: bool, aux_k: int | None
) -> None:
    torch.manual_seed(0)
    sae_class, config_class, fields = KINDS[kind]
    cfg = config_class(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        matryoshka_widths=WIDTHS,
        level_weights=[0.5, 1.0, 2.0, 0.1],
        aux_k=aux_k,
        aux_loss_coefficient=0.3,
        l1_coefficient=0.1,
        rescale_acts_by_decoder_norm=rescale,
        use_matryoshka_aux_loss=per_level,
        dtype="float64",
        **fields,
    )
    sae = sae_class(cfg)
    for parameter in sae.parameters():
        parameter.data.normal_()
    x = torch.randn(N_TOKENS, D_IN, dtype=torch.float64)
    y = x if kind == "sae" else torch.randn(N_TOKENS, D_OUT, dtype=torch.float64)
    dead = torch.rand(D_SAE) < 0.3
    step = TrainStepInput(
        sae_in=x if kind == "sae" else torch.cat([x, y], dim=-1),
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )
    sae.training_forward_pass(step).loss.backward()
    trained = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    loss = _loss(sae, x, y, dead)
    assert sae.training_forward_pass(step).loss.item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(trained[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


def _loss(sae: Any, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Line by line as on the page."""
    cfg, d = sae.cfg, sae.W_dec
    skip = x @ sae.W_skip.T if hasattr(sae, "W_skip") else 0.0
    pre = (x - sae.b_dec if cfg.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    score = (pre * d.norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else pre).detach()
    smallest_kept = score.flatten().sort(descending=True).values[int(K * len(x)) - 1]
    f = torch.where((score >= smallest_kept) & (score > 0), pre, 0.0)
    predictions = [sae.b_dec + f[:, :width] @ d[:width] + skip for width in WIDTHS]
    loss = cfg.l1_coefficient * (f * d.norm(dim=-1)).sum(dim=-1).mean()
    for weight, prediction in zip(cfg.level_weights, predictions, strict=True):
        loss = loss + weight * (y - prediction).pow(2).sum(dim=-1).mean()

    aux_k = cfg.aux_k or y.shape[-1] // 2
    terms = [((0, D_SAE), predictions[-1])]
    if cfg.use_matryoshka_aux_loss:
        terms = list(zip(itertools.pairwise([0, *WIDTHS]), predictions, strict=True))
    latents = torch.arange(D_SAE)
    for (start, end), prediction in terms:
        of_the_level = dead & (start <= latents) & (latents < end)
        if (n_dead := int(of_the_level.sum())) == 0:
            continue
        A = score.masked_fill(~of_the_level, -torch.inf).topk(min(aux_k, n_dead)).indices
        parts = torch.zeros_like(pre).scatter(1, A, pre.gather(1, A)) @ d
        e = (y - prediction).detach()
        scale = cfg.aux_loss_coefficient * min(1, n_dead / aux_k)
        loss = loss + scale * (e - parts).pow(2).sum(dim=-1).mean()
    return loss
