from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka.saebench.single import copy_of, normalize_decoder
from saelens_matryoshka.saebench.views import HookAlias, layer_of, output_view, pair_view
from tests.saebench.dictionaries import SOURCE, TARGET, random_dictionary


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 1000, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def activations(tiny_model: HookedTransformer, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens)
    return cache[SOURCE], cache[TARGET]


def test_pair_view_encodes_the_source_and_decodes_to_the_target(
    tiny_model: HookedTransformer, activations: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = activations
    transcoder = random_dictionary()
    with pair_view(tiny_model, transcoder) as view, torch.no_grad():
        pair = torch.cat([x, y], dim=-1)
        acts = view.encode(pair)
        torch.testing.assert_close(acts, transcoder.encode(x))
        decoded = view.decode(acts)
        assert not decoded[..., :128].any()
        torch.testing.assert_close(decoded[..., 128:], transcoder.decode(acts))
        # as an affine map, by the weights that SAEBench reads
        torch.testing.assert_close(acts @ view.W_dec + view.decode(torch.zeros_like(acts)), decoded)
        torch.testing.assert_close((pair @ view.W_enc + view.b_enc) * (acts != 0), acts)
        assert view.cfg.d_in == 256
        assert view.cfg.metadata.hook_name == "blocks.2.hook_pair"


@pytest.mark.parametrize("stop_at_layer", [None, 3])
def test_pair_hook_carries_source_and_target(
    stop_at_layer: int | None,
    tiny_model: HookedTransformer,
    tokens: torch.Tensor,
    activations: tuple[torch.Tensor, torch.Tensor],
) -> None:
    with pair_view(tiny_model, random_dictionary()) as view, torch.no_grad():
        name = view.cfg.metadata.hook_name
        _, cache = tiny_model.run_with_cache(tokens, names_filter=name, stop_at_layer=stop_at_layer)
        torch.testing.assert_close(cache[name], torch.cat(activations, dim=-1))


def test_what_is_returned_at_the_pair_hook_replaces_the_target_alone(
    tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    def double(y: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return 2 * y

    with torch.no_grad():
        expected = tiny_model.run_with_hooks(tokens, fwd_hooks=[(TARGET, double)])
        with pair_view(tiny_model, random_dictionary()) as view:
            found = tiny_model.run_with_hooks(tokens, fwd_hooks=[(view.cfg.metadata.hook_name, double)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("skip", [False, True])
def test_output_view_predicts_the_target_from_the_source_of_the_same_forward_pass(
    skip: bool,
    tiny_model: HookedTransformer,
    tokens: torch.Tensor,
    activations: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, y = activations
    transcoder = random_dictionary(skip=skip)
    with output_view(tiny_model, transcoder) as view, torch.no_grad():
        tiny_model(tokens)
        torch.testing.assert_close(view.decode(view.encode(y)), transcoder(x))
        with pytest.raises(RuntimeError, match="last forward pass"):
            view.encode(y + 1)
        tiny_model(tokens.flip(0))
        with pytest.raises(RuntimeError, match="last forward pass"):
            view.encode(y)


@pytest.mark.parametrize("view", [pair_view, output_view])
def test_a_view_leaves_the_model_as_it_was(
    view: Any, tiny_model: HookedTransformer, tokens: torch.Tensor
) -> None:
    before = {name: len(point.fwd_hooks) for name, point in tiny_model.hook_dict.items()}
    names = set(tiny_model.mod_dict)
    with torch.no_grad():
        expected = tiny_model(tokens)
        with view(tiny_model, random_dictionary()):
            torch.testing.assert_close(tiny_model(tokens), expected)
        assert torch.equal(tiny_model(tokens), expected)
    assert {name: len(point.fwd_hooks) for name, point in tiny_model.hook_dict.items()} == before
    assert set(tiny_model.mod_dict) == names


def test_alias_answers_one_hook_from_another(tiny_model: HookedTransformer, tokens: torch.Tensor) -> None:
    alias = HookAlias(tiny_model, "blocks.2.hook_resid_post", SOURCE, 7)
    with torch.no_grad():
        _, cache = alias.run_with_cache(tokens, names_filter=["blocks.2.hook_resid_post"])
        _, expected = tiny_model.run_with_cache(tokens, names_filter=[SOURCE])
    assert torch.equal(cache["blocks.2.hook_resid_post"], expected[SOURCE])
    assert alias.cfg.d_model == 7
    assert tiny_model.cfg.d_model == 128
    assert alias.tokenizer is tiny_model.tokenizer


@pytest.mark.parametrize(("hook_name", "hook_name_out"), [(SOURCE, TARGET), (SOURCE, None)])
def test_unit_decoder_rows_leave_the_function_as_it_is(
    hook_name: str, hook_name_out: str | None, activations: tuple[torch.Tensor, torch.Tensor]
) -> None:
    sae = random_dictionary(hook_name, hook_name_out)
    folded = copy_of(sae)
    normalize_decoder(folded)
    x, _ = activations
    with torch.no_grad():
        torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(64))
        torch.testing.assert_close(folded(x), sae(x))
        assert torch.equal(folded.encode(x) != 0, sae.encode(x) != 0)
    assert not torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(64))


def test_hooks_outside_the_blocks_are_refused() -> None:
    assert layer_of("blocks.12.hook_mlp_out") == 12
    with pytest.raises(ValueError, match="'ln_final.hook_normalized' is not in a block"):
        layer_of("ln_final.hook_normalized")
