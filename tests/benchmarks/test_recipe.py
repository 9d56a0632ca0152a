"""The variants of the recipe benchmark are what they are called."""

from __future__ import annotations

import pytest
import torch

from benchmarks import recipe
from benchmarks.quality.activations import Activations, collect
from saelens_matryoshka import tiny

N_STEPS = 6


@pytest.fixture(scope="module")
def activations(tiny_model) -> Activations:
    return collect(
        tiny_model,
        2,
        tiny.text.dataset("train").select(range(20)),
        tiny.text.dataset("held_out").select(range(5)),
        n_tokens=N_STEPS * 256,
        n_validation=256,
        n_held_out=256,
        context_size=64,
        batch_size_prompts=4,
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(recipe, "_BATCH", 256)
    monkeypatch.setattr(recipe, "_WIDTHS", (16, 32, 64, 128))
    monkeypatch.setattr(recipe, "_N_HELD_OUT", 128)


def test_every_variant_trains_to_something_else_than_the_recommended_settings(activations, tiny_model):
    fvu = {
        variant.name: recipe.measure(variant, activations, tiny_model, seed=0)[0][128]
        for variant in recipe.VARIANTS
    }
    # nothing is dead after six steps, so what concerns the dead has nothing to do
    same = {name for name in fvu if "aux" in name}
    others = [value for name, value in fvu.items() if name not in same]
    assert len(set(others)) == len(others)


def test_levels_that_have_not_joined_are_never_selected(activations, tiny_model):
    active: list[int] = []

    class Watched(recipe.Progressive):
        starts = (0.0, 0.3, 0.6, 0.8)

        def training_forward_pass(self, step_input):
            output = super().training_forward_pass(step_input)
            active.append(int(output.feature_acts.coalesce().indices()[1].max()))
            return output

    recipe.measure(recipe.Variant("watched", Watched), activations, tiny_model, seed=0)
    limits = [16, 16, 32, 32, 64, 128]
    assert all(last < limit for last, limit in zip(active, limits, strict=True))
    assert active[-1] >= 64


def test_new_latents_start_orthogonal_to_the_main_directions_of_the_old(activations, tiny_model):
    seen = {}

    class Watched(recipe.ProgressiveOrthogonal):
        def _turn_away(self, old, new):
            super()._turn_away(old, new)
            main = torch.linalg.svd(self.W_dec[:old], full_matrices=False)[2][: min(old, 64)]
            seen[new] = (self.W_dec[old:new] @ main.T).abs().max().item()

    recipe.measure(recipe.Variant("watched", Watched), activations, tiny_model, seed=0)
    assert seen.keys() == {32, 64, 128}
    assert max(seen.values()) < 1e-5


def test_ratios_compare_runs_of_the_same_seed():
    records = [
        {"variant": name, "seed": seed, "fvu": dict.fromkeys(recipe._WIDTHS, fvu), "dead": 0.0}
        for name, seed, fvu in [
            ("recommended", 0, 0.2), ("recommended", 1, 0.4), ("other", 0, 0.1), ("other", 1, 0.6)
        ]
    ]  # fmt: skip
    cells = list(recipe.table(records).columns[1].cells)
    assert cells == ["FVU 0.3000", "1.000 [0.500, 1.500]"]
