"""Any coder in any format: carried without a change in what it computes, or refused. And any other file."""

from __future__ import annotations

import random
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.choices import Choices
from benchmarks.fuzz.harness import try_input
from benchmarks.fuzz.seeds import SEEDS
from saelens_matryoshka.formats import Folder, FormatError, SparseCoder, build, from_saelens
from saelens_matryoshka.formats.coder import fold_decoder_norm, move_b_dec, scale_input
from saelens_matryoshka.formats.registry import FORMATS, load
from tests.formats.coders import assert_same_metadata, expected_output

WRITABLE = [name for name, format in FORMATS.items() if format.writer]


def _coder(
    d_in: int,
    d_out: int,
    sizes: list[int],
    activation: str,
    transcoder: bool,
    skip: bool,
    uniform: bool,
    subtract: bool,
    hooks: tuple[str, str],
    layer: int,
    model_name: str | None,
    seed: int,
) -> SparseCoder:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d_sae, d_out = sum(sizes), d_out if transcoder else d_in
    threshold = torch.full((d_sae,), 0.5) if uniform else normal(d_sae)
    metadata: dict[str, Any] = {"hook_name": f"blocks.{layer}.{hooks[0]}", "model_name": model_name}
    if transcoder:
        metadata["hook_name_out"] = f"blocks.{layer}.{hooks[1]}"
    if len(sizes) > 1:
        metadata["matryoshka_widths"] = list(accumulate(sizes))
    return SparseCoder(
        W_enc=normal(d_in, d_sae),
        b_enc=normal(d_sae),
        W_dec=normal(d_sae, d_out),
        b_dec=normal(d_out),
        threshold=threshold if activation == "jumprelu" else None,
        k=1 + seed % d_sae if activation == "topk" else None,
        W_skip=normal(d_out, d_in) if skip else None,
        subtract_b_dec=subtract and d_in == d_out,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )


coders = st.builds(
    _coder,
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6) | st.just(4),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    activation=st.sampled_from(["relu", "jumprelu", "topk"]),
    transcoder=st.booleans(),
    skip=st.booleans(),
    uniform=st.booleans(),
    subtract=st.booleans(),
    hooks=st.sampled_from(
        [
            ("ln2.hook_normalized", "hook_mlp_out"),
            ("mlp.hook_in", "mlp.hook_out"),
            ("hook_resid_post", "hook_mlp_out"),
            ("hook_resid_mid", "attn.hook_out"),
        ]
    ),
    layer=st.integers(0, 120),
    model_name=st.sampled_from([None, "gpt2", "google/gemma-2-2b", "méthode/模型", "a b"]),
    seed=st.integers(0, 1 << 16),
)


# circuit-tracer has no transcoder that subtracts b_dec, and no set without a layer 0.
CENTRED = _coder(
    d_in=3,
    d_out=3,
    sizes=[4],
    activation="relu",
    transcoder=True,
    skip=False,
    uniform=False,
    subtract=True,
    hooks=("ln2.hook_normalized", "hook_mlp_out"),
    layer=0,
    model_name="gpt2",
    seed=0,
)


def _rows(coder: SparseCoder) -> torch.Tensor:
    return torch.randn(8, coder.d_in, generator=torch.Generator().manual_seed(5))


def _assert_same_function(found: SparseCoder, expected: SparseCoder) -> None:
    x = _rows(expected)
    torch.testing.assert_close(expected_output(found, x), expected_output(expected, x), atol=1e-4, rtol=1e-4)


@settings(max_examples=100)
@given(st.sampled_from(WRITABLE), coders)
@example("circuit-tracer", CENTRED)
def test_a_coder_is_carried_whole_or_refused(format: str, coder: SparseCoder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        try:
            FORMATS[format].save([coder], out)
        except FormatError:
            return
        items = FORMATS[format].items(Folder(folder), "out")
        assert len(items) == 1, items
        found = load(Folder(folder), items[0], format)
    _assert_same_function(found, coder)
    assert found.widths == coder.widths
    assert_same_metadata(found, coder)


@settings(max_examples=30)
@given(coders)
def test_saelens_computes_what_the_coder_says(coder: SparseCoder) -> None:
    try:
        sae = build(coder)
    except FormatError:
        assert coder.activation == "topk"
        return
    x = _rows(coder)
    torch.testing.assert_close(sae(x), expected_output(coder, x), atol=1e-4, rtol=1e-4)
    _assert_same_function(from_saelens(sae), coder)


@given(coders)
def test_writing_the_same_function_otherwise_keeps_it(coder: SparseCoder) -> None:
    if coder.activation != "topk":  # which compares the pre-activations that folding scales
        _assert_same_function(fold_decoder_norm(coder), coder)
    if coder.d_in == coder.d_out:
        _assert_same_function(move_b_dec(coder, subtract=not coder.subtract_b_dec), coder)
    if not coder.subtract_b_dec:
        gain, offset = torch.rand(coder.d_in) + 0.5, torch.randn(coder.d_in)
        x = _rows(coder)
        torch.testing.assert_close(
            expected_output(scale_input(coder, gain, offset), x),
            expected_output(coder, x * gain + offset),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("index", range(len(SEEDS)), ids=[format for format, _ in SEEDS])
def test_the_fuzzers_seeds_are_read(index: int, tmp_path: Path) -> None:
    assert try_input(bytes([index]), tmp_path / "input").refusal is None


def test_hostile_files_are_refused_in_time_and_space(tmp_path: Path) -> None:
    """A few of the inputs of `python -m benchmarks.fuzz`, which makes up as many as there is time for."""
    generator = random.Random(7)
    refused = sum(
        try_input(generator.randbytes(96), tmp_path / "input").refusal is not None for _ in range(120)
    )
    assert 40 < refused < 120


def test_choices_past_the_end_are_the_first_ones() -> None:
    choices = Choices(b"\x05")
    assert choices.pick("abcdefgh") == "f"
    assert choices.pick("abc") == "a"
    assert choices.integer(3, 9) == 3
    assert not choices.chance(2)
