from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_matryoshka import tiny
from saelens_matryoshka.report.logits import logit_effects
from tests import tiny_models
from tests.report.conftest import random_sae

FAMILIES = {
    "gpt2": (tiny_models.gpt2_hf, "transformer.ln_f"),
    "neox": (tiny_models.neox_hf, "gpt_neox.final_layer_norm"),
    "llama": (tiny_models.llama_hf, "model.norm"),
    "gemma2": (tiny_models.gemma2_hf, "model.norm"),
}


def _sae(hook: str, **metadata: Any) -> JumpReLUSAE:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=tiny_models.D_MODEL, d_sae=30))
    sae.W_dec.data.normal_()
    sae.cfg.metadata = SAEMetadata(hook_name=hook, **metadata)
    return sae


@torch.no_grad()
def _expected(hf: Any, norm_name: str, directions: torch.Tensor) -> torch.Tensor:
    """What the model's own final norm and unembedding make of the directions, without their offsets."""
    norm = hf.get_submodule(norm_name)
    offset = getattr(norm, "bias", None)
    normed = norm(directions) - (0 if offset is None else offset)
    return normed @ hf.get_output_embeddings().weight.T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["hooked_transformer", "bridge", "proxy"])
def test_they_are_what_the_models_own_final_norm_and_unembedding_give(family: str, kind: str) -> None:
    make, norm_name = FAMILIES[family]
    hf = make()
    if kind == "hooked_transformer":
        model: Any = tiny_models.hooked_transformer(hf)
    elif kind == "bridge":
        model = tiny_models.bridge(hf)
    else:
        model = tiny_models.proxy(hf)
    layer = {"gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1"}.get(family, "model.layers.1")
    sae = _sae(layer if kind == "proxy" else "blocks.1.hook_resid_post")
    found = logit_effects(sae, model, n=4)
    expected = _expected(hf, norm_name, sae.W_dec.detach())
    top, bottom = expected.topk(4), expected.topk(4, largest=False)
    assert torch.equal(found.top_tokens, top.indices)
    assert torch.equal(found.bottom_tokens, bottom.indices)
    ratio = found.top_values / top.values  # the norm's scale, of each direction
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert (ratio > 0).all()
    assert torch.equal(found.histogram.sum(dim=1), torch.full((30,), expected.shape[1]))


def test_folding_the_final_norm_changes_nothing() -> None:
    sae = random_sae(d_sae=40)
    plain = logit_effects(sae, tiny.load_hooked_transformer())
    folded = logit_effects(sae, tiny.load_hooked_transformer(fold_ln=True))
    assert torch.equal(plain.top_tokens, folded.top_tokens)
    torch.testing.assert_close(plain.top_values, folded.top_values)


def test_a_transcoder_counts_by_what_it_writes() -> None:
    model = tiny.load_hooked_transformer()
    reads = random_sae(hook="blocks.2.ln2.hook_normalized")
    with pytest.raises(ValueError, match="not added to the residual stream"):
        logit_effects(reads, model)
    writes = copy.deepcopy(reads)
    writes.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out"
    assert logit_effects(writes, model).top_tokens.shape == (96, 10)


def test_heads_are_taken_through_the_output_matrix() -> None:
    hf = tiny_models.llama_hf()
    model = tiny_models.hooked_transformer(hf)
    sae = _sae("blocks.1.attn.hook_z")
    found = logit_effects(sae, model, n=3)
    z = sae.W_dec.detach().view(30, tiny_models.N_HEADS, tiny_models.D_HEAD)
    written = torch.einsum("jhd,hdm->jm", z, model.blocks[1].attn.W_O.detach())
    assert torch.equal(found.top_tokens, _expected(hf, "model.norm", written).topk(3).indices)
