"""Every preset, against the real dimensions of its model."""

from __future__ import annotations

import pytest
import torch
from sae_lens.training.optim import get_lr_scheduler
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_matryoshka.runs.mappings import skeleton
from saelens_matryoshka.runs.presets import load_preset, preset_names
from saelens_matryoshka.runs.settings import resolve

# Width, layers and longest context in the config.json of these repositories of the hub (hidden_size or
# n_embd, num_hidden_layers or n_layer, max_position_embeddings or n_positions).
ON_THE_HUB = {
    "gpt2": (768, 12, 1024),
    "gpt2-medium": (1024, 24, 1024),
    "gpt2-large": (1280, 36, 1024),
    "gpt2-xl": (1600, 48, 1024),
    "EleutherAI/pythia-70m-deduped": (512, 6, 2048),
    "EleutherAI/pythia-160m-deduped": (768, 12, 2048),
    "EleutherAI/pythia-410m-deduped": (1024, 24, 2048),
    "EleutherAI/pythia-1.4b-deduped": (2048, 24, 2048),
    "Qwen/Qwen3-0.6B": (1024, 28, 40960),
    "Qwen/Qwen3-1.7B": (2048, 28, 40960),
    "Qwen/Qwen3-4B": (2560, 36, 40960),
    "Qwen/Qwen3-8B": (4096, 36, 40960),
}
# Width and layers of those that TransformerLens knows by itself.
IN_TRANSFORMER_LENS = {
    "google/gemma-2-2b": (2304, 26),
    "google/gemma-2-9b": (3584, 42),
    "google/gemma-2-27b": (4608, 46),
    "google/gemma-3-270m": (640, 18),
    "google/gemma-3-1b-pt": (1152, 26),
    "google/gemma-3-4b-pt": (2560, 34),
    "google/gemma-3-12b-pt": (3840, 48),
    "google/gemma-3-27b-pt": (5376, 62),
    "meta-llama/Llama-3.2-1B": (2048, 16),
}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_fits_its_model(name: str) -> None:
    preset = load_preset(name)
    settings = resolve([preset.settings])
    cfg, model = settings.cfg, skeleton(settings.cfg.model_name)
    official = "tiny" if cfg.model_name == "tiny" else get_official_model_name(cfg.model_name)
    width, n_layers = (
        (128, 4)
        if official == "tiny"
        else IN_TRANSFORMER_LENS[official]
        if official in IN_TRANSFORMER_LENS
        else ON_THE_HUB[official][:2]
    )
    assert (model.cfg.d_model, model.cfg.n_layers) == (width, n_layers)
    assert (cfg.sae.d_in, cfg.sae.d_out) == (width, width)
    layer = settings.given["layer"].value
    assert 0 <= layer < n_layers
    if official in ON_THE_HUB:  # of long ones TransformerLens takes 2048, for its masks
        assert model.cfg.n_ctx == min(ON_THE_HUB[official][2], 2048)
    assert cfg.hook_name == f"blocks.{layer}.ln2.hook_normalized"
    assert cfg.sae.hook_name_out == f"blocks.{layer}.hook_mlp_out"
    assert cfg.sae.input_gain == "norm_weight"
    assert cfg.sae.d_sae % width == 0
    assert cfg.sae.k < cfg.sae.matryoshka_widths[0]
    assert cfg.exclude_special_tokens is True
    # A buffer of at least 8 batches mixes them, and a prompt fits the model.
    assert cfg.n_batches_in_buffer * cfg.context_size >= 8 * cfg.train_batch_size_tokens
    assert cfg.context_size <= model.cfg.n_ctx
    assert preset.description


def test_every_family_has_its_presets() -> None:
    models = {load_preset(name).settings["model_name"].value for name in preset_names()}
    official = {name if name == "tiny" else get_official_model_name(name) for name in models}
    assert official == {"tiny", *ON_THE_HUB, *IN_TRANSFORMER_LENS}


@pytest.mark.parametrize("layer", [8, 12, 17])
@pytest.mark.parametrize(
    ("variant", "widths", "tokens"),
    [
        ("", [1152, 3456, 8064, 18432], 15_000_000),
        ("-wide", [2304, 6912, 16128, 36864], 20_000_000),
        ("-short", [1152, 3456, 8064, 18432], 1_000_000),
    ],
)
def test_the_recipes_of_gemma_2_2b(layer: int, variant: str, widths: list[int], tokens: int) -> None:
    cfg = resolve([load_preset(f"gemma-2-2b-layer-{layer}{variant}").settings]).cfg
    assert cfg.sae.matryoshka_widths == widths
    assert (cfg.sae.k, cfg.lr, cfg.training_tokens) == (96, 4e-4, tokens)
    assert cfg.hook_name.startswith(f"blocks.{layer}.")


@pytest.mark.parametrize(("name", "end"), [("gemma-2-2b-layer-8", 4e-6), ("gemma-2-2b", 0.0)])
def test_the_learning_rate_warms_up_and_decays_to_its_end(name: str, end: float) -> None:
    cfg = resolve([load_preset(name).settings]).cfg.to_sae_trainer_config()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=cfg.lr)
    assert cfg.lr_end is not None
    schedule = get_lr_scheduler(
        cfg.lr_scheduler_name,
        optimizer,
        cfg.total_training_steps,
        cfg.lr,
        cfg.lr_warm_up_steps,
        cfg.lr_decay_steps,
        cfg.lr_end,
        cfg.n_restart_cycles,
    )
    rates = []
    for _ in range(cfg.total_training_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert rates[0] < 0.01 * cfg.lr
    assert max(rates) == pytest.approx(cfg.lr)
    assert 0 < top <= cfg.lr_warm_up_steps
    assert rates[-1] == pytest.approx(end, abs=1e-3 * cfg.lr)
    assert all(
        later <= earlier * (1 + 1e-6) for earlier, later in zip(rates[top:], rates[top + 1 :], strict=False)
    )


def test_an_unknown_preset_is_named_with_a_similar_one() -> None:
    with pytest.raises(ValueError, match="--preset 'gpt-2' is not known; did you mean gpt2"):
        load_preset("gpt-2")
    with pytest.raises(ValueError, match="is not known"):
        load_preset("../presets/gpt2")


def test_a_preset_holds_only_what_differs() -> None:
    for name in preset_names():
        given = load_preset(name).settings
        assert not given.keys() & {
            "device",
            "hook_name",
            "hook_name_out",
            "d_in",
            "output_path",
            "log_to_wandb",
        }
    assert load_preset("quick").to_dict()["model_name"] == "gpt2"


def test_presets_are_listed_by_size() -> None:
    names = preset_names()
    assert names[:2] == ["tiny", "quick"]
    for listed in (
        ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
        ["gemma-2-2b", "gemma-2-2b-layer-8", "gemma-2-2b-layer-8-wide", "gemma-2-2b-layer-12", "gemma-2-9b"],
        ["gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b"],
        ["pythia-70m", "pythia-160m", "pythia-1.4b"],
    ):
        assert sorted(listed, key=names.index) == listed
