"""Ours → another format → ours, to the last bit, for everything the format can carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

import saelens_matryoshka as sm
from saelens_matryoshka.formats import Folder, FormatError, SparseCoder, build, converter
from saelens_matryoshka.formats.registry import FORMATS, load
from tests.formats.coders import (
    LATENTS,
    WIDTHS,
    assert_same,
    assert_same_metadata,
    expected_output,
    inputs,
    random_coder,
)

_MLP = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.mlp.hook_out", "input_frame": None}

# format, coder, file or folder that load_from_disk is given
CARRIED: list[tuple[str, dict[str, Any], str]] = [
    ("circuit-tracer", {}, "layer_0.safetensors"),
    ("circuit-tracer", {"skip": True}, "layer_0"),
    ("circuit-tracer", {"activation": "relu"}, "layer_0.safetensors"),
    ("circuit-tracer", {"activation": "relu", "skip": True}, "layer_0.safetensors"),
    ("circuit-tracer", {"dtype": torch.bfloat16}, "layer_0.safetensors"),
    ("sparsify", {"activation": "topk", **_MLP}, "layers.0.mlp"),
    ("sparsify", {"activation": "relu", **_MLP}, "layers.0.mlp"),
    ("sparsify", {"activation": "relu", "skip": True, **_MLP}, "layers.0.mlp"),
    ("sparsify", {"activation": "topk", "transcoder": False}, "layers.0"),
    ("sparsify", {"activation": "relu", "transcoder": False, "model_name": "gpt2"}, "h.0"),
    ("dictionary-learning", {"transcoder": False, "uniform": True}, "."),
    ("dictionary-learning", {"transcoder": False, "uniform": True, "matryoshka_widths": None}, "."),
    ("dictionary-learning", {"transcoder": False, "subtract_b_dec": False}, "."),
    ("dictionary-learning", {"transcoder": False, "activation": "topk"}, "."),
]


def _write(format: str, coder: SparseCoder, out: Path) -> None:
    out.mkdir()
    save = FORMATS[format].save
    save([coder], out)


@pytest.mark.parametrize(("format", "kind", "item"), CARRIED, ids=str)
def test_the_round_trip_is_exact(format: str, kind: dict[str, Any], item: str, tmp_path: Path) -> None:
    coder = random_coder(**kind).with_metadata()
    _write(format, coder, tmp_path / "out")
    found = load(Folder(tmp_path / "out"), item, format)
    assert_same(found, coder)
    assert_same_metadata(found, coder)
    assert found.is_transcoder == coder.is_transcoder


@pytest.mark.parametrize(("format", "kind", "item"), CARRIED, ids=str)
def test_saelens_loads_it_through_the_converter(
    format: str, kind: dict[str, Any], item: str, tmp_path: Path
) -> None:
    coder = random_coder(**kind).with_metadata()
    _write(format, coder, tmp_path / "out")
    sae = SAE.load_from_disk(tmp_path / "out" / item, dtype="float32", converter=converter(format))
    x = inputs()
    wide = coder.with_tensors(
        **{name: value.float() for name, value in vars(coder).items() if isinstance(value, torch.Tensor)}
    )
    torch.testing.assert_close(sae(x), expected_output(wide, x))
    assert sm.matryoshka_widths(sae) == coder.widths
    assert sae.cfg.metadata.hook_name == coder.metadata["hook_name"]


@pytest.mark.parametrize(
    ("kind", "exact"),
    [
        ({"transcoder": False, "subtract_b_dec": True}, False),  # a threshold per latent, b_dec subtracted
        ({"transcoder": False, "activation": "topk", "subtract_b_dec": False}, False),
        ({"transcoder": False, "activation": "relu"}, False),
    ],
    ids=str,
)
def test_dictionary_learning_keeps_the_function_where_it_writes_it_otherwise(
    kind: dict[str, Any], exact: bool, tmp_path: Path
) -> None:
    coder = random_coder(**kind)
    _write("dictionary-learning", coder, tmp_path / "out")
    found = load(Folder(tmp_path), "out", "dictionary-learning")
    assert_same(found, coder, exact=exact)
    assert found.widths == WIDTHS


def test_a_module_is_named_only_by_metadata_that_mean_its_input_and_output() -> None:
    """Gemma Scope 2's hook points are both outputs, of two modules."""
    from saelens_matryoshka.formats.sparsify import hookpoint_of

    hf = {"hf_hook_name": "gpt_neox.layers.0.mlp.input", "hf_hook_name_out": "gpt_neox.layers.0.mlp.output"}
    assert hookpoint_of(random_coder("topk", **_MLP, **hf)) == "gpt_neox.layers.0.mlp"
    scope = {"hf_hook_name": "model.layers.0.pre_feedforward_layernorm.output"}
    scope |= {"hf_hook_name_out": "model.layers.0.post_feedforward_layernorm.output"}
    with pytest.raises(FormatError, match="no module reads"):
        hookpoint_of(random_coder("topk", **_MLP | {"hook_name_out": "blocks.0.hook_mlp_out"}, **scope))
    harm = {"hf_hook_name": "../../harm.input", "hf_hook_name_out": "../../harm.output"}
    assert hookpoint_of(random_coder("topk", **_MLP, **harm)) == "layers.0.mlp"


_SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11}
_LLAMA = {**_SMALL, "num_key_value_heads": 1, "intermediate_size": 8, "head_dim": 4}
_GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11}
_NEO = {**_SMALL, "num_layers": 1, "attention_types": [[["global"], 1]]}


@pytest.mark.parametrize(
    ("name", "model_type", "config"),
    [
        ("gpt2-small", "gpt2", _GPT2),
        ("stanford-crfm/alias-gpt2-small-x21", "gpt2", _GPT2),
        (
            "EleutherAI/gpt-neo-125M",
            "gpt_neo",
            _NEO,
        ),
        ("tiny-stories-33M", "gpt_neo", _NEO),
        ("EleutherAI/gpt-j-6B", "gptj", {**_GPT2, "rotary_dim": 2}),
        ("EleutherAI/pythia-70m-deduped", "gpt_neox", {**_SMALL, "intermediate_size": 8}),
        ("pythia-160m-seed1", "gpt_neox", {**_SMALL, "intermediate_size": 8}),
        ("meta-llama/Llama-3.2-1B", "llama", _LLAMA),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama", _LLAMA),
        ("llama-7b-hf", "llama", _LLAMA),
        ("mistralai/Mistral-7B-v0.1", "mistral", _LLAMA),
        ("Qwen/Qwen2.5-0.5B", "qwen2", _LLAMA),
        ("Qwen/Qwen3-0.6B", "qwen3", _LLAMA),
        ("gemma-2b", "gemma", _LLAMA),
        ("google/gemma-2-2b", "gemma2", _LLAMA),
        ("google/gemma-3-1b-pt", "gemma3_text", _LLAMA),
        ("microsoft/phi-2", "phi", {**_SMALL, "intermediate_size": 8}),
        ("allenai/OLMo-1B-hf", "olmo", _LLAMA),
        ("allenai/OLMo-2-0425-1B", "olmo2", _LLAMA),
        ("tiny", "gemma2", _LLAMA),
    ],
)
def test_the_modules_sparsify_is_told_of_are_the_models(
    name: str, model_type: str, config: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModel

    from saelens_matryoshka.formats.sparsify import hookpoint_of

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **config))
    modules = {found for found, _ in model.base_model.named_modules()}
    for hook in ("hook_resid_post", "mlp.hook_out", "attn.hook_out"):
        coder = random_coder("topk", transcoder=False, hook_name=f"blocks.0.{hook}", model_name=name)
        assert hookpoint_of(coder) in modules


@pytest.mark.parametrize(
    "name",
    [
        "facebook/opt-125m",
        "google/gemma-3-4b-pt",
        "meta-llama/Llama-3.2-11B-Vision",
        "Qwen/Qwen2-VL-7B",
        "mine",
    ],
)
def test_modules_of_an_unknown_model_are_not_guessed(name: str) -> None:
    from saelens_matryoshka.formats.sparsify import hookpoint_of

    with pytest.raises(FormatError, match=f"what '{name}' calls its modules is not known"):
        hookpoint_of(random_coder("topk", transcoder=False, model_name=name))
    named = random_coder("topk", transcoder=False, model_name=name, hf_hook_name="decoder.layers.0.output")
    assert hookpoint_of(named) == "decoder.layers.0"


def test_thresholds_below_zero_are_those_of_a_relu(tmp_path: Path) -> None:
    """circuit-tracer's JumpReLU lets negative values above a negative threshold through, SAELens's not."""
    coder = random_coder()
    assert coder.threshold is not None
    coder = coder.with_tensors(threshold=coder.threshold - 1)
    _write("circuit-tracer", coder, tmp_path / "out")
    found = load(Folder(tmp_path / "out"), "layer_0", "circuit-tracer")
    assert found.threshold is not None
    assert found.threshold.min() >= 0
    assert_same(found, coder, exact=False)


def test_a_set_of_layers_comes_back_by_layer(tmp_path: Path) -> None:
    coders = [random_coder(layer=layer) for layer in range(12)]
    out = tmp_path / "set"
    out.mkdir()
    save = FORMATS["circuit-tracer"].save
    save(coders[::-1], out)
    items = FORMATS["circuit-tracer"].items(Folder(tmp_path), "set")
    assert items == [f"set/layer_{layer}.safetensors" for layer in range(12)]
    for item, coder in zip(items, coders, strict=True):
        assert_same(load(Folder(tmp_path), item, "circuit-tracer"), coder)


REFUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    ("circuit-tracer", [{"transcoder": False}], "is an SAE"),
    ("circuit-tracer", [{"activation": "topk"}], "--calibrate-l0"),
    ("circuit-tracer", [{"d_out": 8}], "16 to 8"),
    ("circuit-tracer", [{"layer": 1}], "none of layer 0"),
    ("circuit-tracer", [{"layer": 0}, {"layer": 2}], "none of layer 1"),
    ("circuit-tracer", [{}, {}], "Two of the transcoders are of layer 0"),
    ("circuit-tracer", [{}, {"layer": 1, "skip": True}], "equal skips"),
    ("circuit-tracer", [{}, {"layer": 1, "model_name": "other"}], "equal language models"),
    ("circuit-tracer", [{"input_frame": "normalized_folded"}], "norms not folded"),
    ("circuit-tracer", [{"hook_name_out": "blocks.1.hook_mlp_out"}], "in one block"),
    ("circuit-tracer", [{"hook_name": "ln_final.hook_normalized"}], "in one block"),
    ("sparsify", [{}], "no module reads"),
    ("sparsify", [_MLP], "--topk K"),
    ("sparsify", [{"activation": "relu", "d_out": 8, **_MLP}], "16 to 8"),
    ("dictionary-learning", [{}], "SAEs only"),
    ("dictionary-learning", [{"transcoder": False, "hook_name": "blocks.0.hook_resid_mid"}], "has none for"),
]


@pytest.mark.parametrize(("format", "kinds", "why"), REFUSED, ids=str)
def test_what_a_format_cannot_carry_is_refused_and_why(
    format: str, kinds: list[dict[str, Any]], why: str, tmp_path: Path
) -> None:
    save = FORMATS[format].save
    with pytest.raises(FormatError, match=why):
        save([random_coder(**kind) for kind in kinds], tmp_path)


def test_a_prefix_is_the_set_that_its_truncation_is(tmp_path: Path) -> None:
    coder = random_coder()
    narrow = sm.truncate(build(coder), WIDTHS[0])
    assert narrow.cfg.d_sae < LATENTS
    from saelens_matryoshka.formats import from_saelens

    _write("circuit-tracer", from_saelens(narrow), tmp_path / "out")
    found = SAE.load_from_disk(tmp_path / "out" / "layer_0", converter=converter("circuit-tracer"))
    x = inputs()
    assert torch.equal(found(x), narrow(x))
