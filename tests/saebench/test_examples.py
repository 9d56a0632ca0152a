"""Which passages a latent is described from and scored on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka.saebench.examples import Examples, examples_of

pytestmark = pytest.mark.usefixtures("sae_bench")
BUFFER = 4


def _config(**settings: Any) -> Any:
    numbers = {
        "buffer": BUFFER,
        "act_threshold_frac": 0.01,
        "n_top_ex_for_generation": 4,
        "n_iw_sampled_ex_for_generation": 3,
        "n_top_ex_for_scoring": 2,
        "n_random_ex_for_scoring": 10,
        "n_iw_sampled_ex_for_scoring": 2,
        **settings,
    }
    return SimpleNamespace(**numbers, n_top_ex=6, n_iw_sampled_ex=5)


def _examples(acts: torch.Tensor, model: HookedTransformer, seed: int = 0) -> Examples | None:
    # tokens that say where they are
    tokens = torch.arange(acts.numel()).view_as(acts)
    assert acts.numel() < model.cfg.d_vocab
    return examples_of(acts, tokens, model, _config(), torch.Generator().manual_seed(seed))


def _sparse(n_prompts: int = 20, length: int = 40) -> torch.Tensor:
    acts = torch.rand(n_prompts, length)
    return acts * (torch.rand(n_prompts, length) < 0.1)


def test_passages_hold_the_activations_of_their_tokens(tiny_model: HookedTransformer) -> None:
    acts = _sparse()
    examples = _examples(acts, tiny_model)
    assert examples is not None
    for passage in [*examples.generation, *examples.scoring]:
        assert len(passage.toks) == 2 * BUFFER + 1
        assert passage.acts == acts.flatten()[passage.toks].tolist()
        assert passage.is_active == any(act > 0.01 * acts.max() for act in passage.acts)


def test_strong_and_weak_passages_do_not_overlap_and_are_the_strongest(tiny_model: HookedTransformer) -> None:
    acts = _sparse()
    examples = _examples(acts, tiny_model)
    assert examples is not None
    generation = list(examples.generation)
    assert len(generation) == 4 + 3
    assert len(list(examples.scoring)) == 2 + 2 + 10
    inner = acts[:, BUFFER:-BUFFER]
    assert max(max(passage.acts) for passage in generation + list(examples.scoring)) >= inner.max()
    firing = generation + [passage for passage in examples.scoring if passage.acts[BUFFER] > 0]
    seen = [token for passage in generation for token in passage.toks]
    assert len(seen) == len(set(seen))
    assert len(firing) >= 4 + 3 + 2 + 2


def test_a_random_passage_in_which_the_latent_fires_counts_as_such(tiny_model: HookedTransformer) -> None:
    acts = torch.rand(20, 40) + 0.1  # fires everywhere
    examples = _examples(acts, tiny_model)
    assert examples is not None
    assert all(passage.is_active for passage in examples.scoring)


def test_a_latent_of_one_strength_has_examples(tiny_model: HookedTransformer) -> None:
    examples = _examples((_sparse() > 0).float(), tiny_model)
    assert examples is not None
    assert len(list(examples.generation)) == 7


def test_fewer_weak_passages_are_shared_and_too_few_strong_ones_left_out(
    tiny_model: HookedTransformer,
) -> None:
    acts = torch.zeros(20, 40)
    acts[:6, 20] = 1.0
    examples = _examples(acts, tiny_model)
    assert examples is not None
    assert len(list(examples.generation)) == 4
    assert len(list(examples.scoring)) == 2 + 10
    acts[5, 20] = 0
    assert _examples(acts, tiny_model) is None


def test_weak_passages_are_drawn_by_squared_activation(tiny_model: HookedTransformer) -> None:
    acts = torch.zeros(20, 40)
    acts[:6, 20] = 9.0
    acts[6, 20], acts[7, 20] = 3.0, 1.0  # nine times as likely to be drawn first
    drawn_first = 0
    for seed in range(200):
        config = _config(n_iw_sampled_ex_for_generation=1, n_iw_sampled_ex_for_scoring=0)
        config.n_iw_sampled_ex = 1
        tokens = torch.arange(acts.numel()).view_as(acts)
        examples = examples_of(acts, tokens, tiny_model, config, torch.Generator().manual_seed(seed))
        assert examples is not None
        drawn_first += any(max(passage.acts) == 3.0 for passage in examples.generation)
    assert 160 <= drawn_first <= 196
