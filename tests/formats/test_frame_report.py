"""Which tensor a transcoder was trained to read is found by measuring."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka import Site, find_site, tiny
from saelens_matryoshka.formats import SparseCoder, build
from saelens_matryoshka.formats.frame_report import Candidate, FrameReport, candidate_sites, measure_frames
from tests import tiny_models
from tests.formats.coders import random_coder

LAYER = 2
NORMALIZED, RESIDUAL = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_resid_mid"
TARGET = f"blocks.{LAYER}.hook_mlp_out"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    """The embedded model with gains that differ much, so that the frames do."""
    model = tiny.load_hooked_transformer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.blocks[LAYER].ln2.w *= torch.randn(128, generator=generator).exp()
    return model


@pytest.fixture(scope="module")
def tokens(model: HookedTransformer) -> torch.Tensor:
    documents = tiny.text.dataset("held_out")["text"][:60]
    prompts = [model.to_tokens(document, prepend_bos=True)[:, :128] for document in documents]
    return torch.cat([prompt for prompt in prompts if prompt.shape[1] == 128][:24])


def _linear(model: HookedTransformer, tokens: torch.Tensor, name: str, declared: str) -> SparseCoder:
    """The transcoder that is the best linear prediction of the target from a tensor."""
    site = find_site(model, LAYER, name)
    _, cache = model.run_with_cache(tokens[:16])
    x = site(cache[site.hook_name])[:, 1:].flatten(0, 1)
    y = cache[TARGET][:, 1:].flatten(0, 1)
    A = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    eye = torch.eye(len(A))
    return SparseCoder(
        W_enc=torch.cat([eye, -eye], dim=1),
        b_enc=torch.zeros(2 * len(A)),
        W_dec=torch.cat([A, -A]),
        b_dec=y.mean(0) - x.mean(0) @ A,
        threshold=torch.zeros(2 * len(A)),
        metadata={"hook_name": declared, "hook_name_out": TARGET},
    )


@pytest.mark.parametrize(
    ("name", "true_name"),
    [
        ("resid_mid", RESIDUAL),
        ("ln2_normalized", NORMALIZED),
        ("mlp_in", f"{NORMALIZED} × gain"),
    ],
)
@pytest.mark.parametrize("declared", [RESIDUAL, NORMALIZED])
def test_the_tensor_it_was_trained_on_is_found(
    model: HookedTransformer, tokens: torch.Tensor, name: str, true_name: str, declared: str
) -> None:
    sae = build(_linear(model, tokens, name, declared))
    report = measure_frames(sae, model, None, tokens[16:], n_tokens=900)
    assert [candidate.name for candidate in report.trained_on] == [true_name]
    assert report.candidates[0].fvu < 0.9
    assert report.agrees == (true_name == declared)
    assert ("as it declares" if report.agrees else f"DECLARES {declared}") in report.verdict
    assert report.n_tokens == 8 * 127


def test_frames_that_are_nearly_one_tensor_are_not_told_apart() -> None:
    """The embedded model's own gains are near 1."""
    model = tiny.load_hooked_transformer()
    tokens = torch.randint(3, 1000, (24, 64), generator=torch.Generator().manual_seed(0))
    sae = build(_linear(model, tokens, "ln2_normalized", NORMALIZED))
    report = measure_frames(sae, model, LAYER, tokens[:16], n_tokens=900)
    assert NORMALIZED in [candidate.name for candidate in report.trained_on]
    assert report.agrees


def test_among_close_ones_the_l0_of_its_training_decides() -> None:
    right = Candidate("hook_normalized", Site("a"), fvu=0.50, l0=12.8)
    gained = Candidate("× gain", Site("b"), fvu=0.48, l0=19.0)
    report = FrameReport([gained, right], "hook_normalized", TARGET, 1000, trained_l0=12)
    assert report.trained_on == [right]
    assert report.agrees
    unknown = FrameReport([gained, right], "hook_normalized", TARGET, 1000)
    assert len(unknown.trained_on) == 2
    assert "too close to tell" in unknown.verdict


def test_a_transcoder_of_something_else_is_said_to_be_one(
    model: HookedTransformer, tokens: torch.Tensor
) -> None:
    coder = _linear(model, tokens, "ln2_normalized", NORMALIZED)
    other = coder.with_tensors(W_dec=10 * torch.randn_like(coder.W_dec))
    report = measure_frames(build(other), model, LAYER, tokens, n_tokens=500)
    assert "another layer, model or target" in report.verdict
    assert not report.agrees


def test_a_bridge_has_the_true_input_as_a_hook_and_it_equals_the_gained_one() -> None:
    bridge = tiny_models.bridge(tiny_models.gemma2_hf())
    sites = candidate_sites(bridge, 1, "blocks.1.mlp.hook_in")
    assert {"blocks.1.mlp.hook_in", "blocks.1.ln2.hook_normalized × gain"} <= set(sites)
    _, cache = bridge.run_with_cache(torch.randint(1, 50, (1, 8)))
    gained = sites["blocks.1.ln2.hook_normalized × gain"](cache["blocks.1.ln2.hook_normalized"])
    torch.testing.assert_close(gained, cache["blocks.1.mlp.hook_in"])


def test_the_true_input_is_recognised_where_it_has_no_hook_of_its_own(
    model: HookedTransformer, tokens: torch.Tensor
) -> None:
    """A HookedTransformer has no `mlp.hook_in`: there it is the normalised tensor times the gain."""
    sae = build(_linear(model, tokens, "mlp_in", f"blocks.{LAYER}.mlp.hook_in"))
    report = measure_frames(sae, model, None, tokens[16:], n_tokens=900)
    assert report.agrees
    llama = tiny_models.hooked_transformer(tiny_models.llama_hf())
    coder = random_coder(layer=1, hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.mlp.hook_out")
    prompts = torch.randint(1, tiny_models.VOCAB, (4, 16))
    report = measure_frames(build(coder), llama, None, prompts, n_tokens=64)
    assert report.target == "blocks.1.hook_mlp_out"


def test_only_transcoders_have_a_frame(model: HookedTransformer, tokens: torch.Tensor) -> None:
    coder = _linear(model, tokens, "ln2_normalized", NORMALIZED)
    with pytest.raises(ValueError, match="only of a transcoder"):
        measure_frames(build(coder.with_metadata(hook_name_out=None)), model, LAYER, tokens)
    with pytest.raises(ValueError, match="layer=9"):
        measure_frames(build(coder), model, 9, tokens)
