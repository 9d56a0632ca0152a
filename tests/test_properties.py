"""Properties of widths and prefixes, for any sizes."""

from __future__ import annotations

import warnings
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saelens_matryoshka as sm
from saelens_matryoshka.formats import SparseCoder, build
from saelens_matryoshka.widths import latent_levels

group_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(st.lists(st.integers(-3, 40), max_size=6), st.integers(0, 60))
def test_any_list_is_refused_or_becomes_cumulative_widths(sizes: list[int], d_sae: int) -> None:
    try:
        widths = sm.cumulative_widths(sizes, d_sae)
    except ValueError:
        return  # tests/test_widths.py reads the messages
    assert widths[0] > 0
    assert widths[-1] == d_sae
    assert all(low < high for low, high in pairwise(widths))
    assert sm.cumulative_widths(widths, d_sae) == widths


@given(group_sizes)
def test_each_level_has_as_many_latents_as_its_group(sizes: list[int]) -> None:
    widths = list(accumulate(sizes))
    levels = latent_levels(widths)
    assert torch.bincount(levels, minlength=len(sizes)).tolist() == sizes
    assert levels.tolist() == sorted(levels.tolist())


def _model(sizes: list[int], d_in: int, d_out: int, kind: str, seed: int) -> Any:
    """A stock model of float64, so that what differs differs by more than rounding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    d_out = d_in if kind == "sae" else d_out
    hooks = {"hook_name": "blocks.0.ln2.hook_normalized", "hook_name_out": "blocks.0.hook_mlp_out"}
    return build(
        SparseCoder(
            W_enc=normal(d_in, sum(sizes)),
            b_enc=normal(sum(sizes)),
            W_dec=normal(sum(sizes), d_out),
            b_dec=normal(d_out),
            threshold=normal(sum(sizes)).abs(),
            W_skip=normal(d_out, d_in) if kind == "skip" else None,
            subtract_b_dec=kind == "sae",
            metadata={**hooks, "matryoshka_widths": list(accumulate(sizes))}
            if kind != "sae"
            else {"hook_name": "x", "matryoshka_widths": list(accumulate(sizes))},
        )
    )


models = st.builds(
    _model,
    group_sizes,
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(["sae", "transcoder", "skip"]),
    st.integers(0, 1 << 16),
)


def _rows(model: Any) -> torch.Tensor:
    return torch.randn(3, 2, model.cfg.d_in, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@given(models)
def test_every_prefix_encodes_and_predicts_as_the_whole_does_up_to_its_width(model: Any) -> None:
    x = _rows(model)
    acts = model.encode(x)
    levels = sm.decode_prefixes(model, acts)
    skip = x @ model.W_skip.T if hasattr(model, "W_skip") else 0
    for width, decoded in zip(sm.matryoshka_widths(model), levels, strict=True):
        prefix = sm.truncate(model, width)
        assert sm.matryoshka_widths(prefix)[-1] == prefix.cfg.d_sae == width
        torch.testing.assert_close(prefix.encode(x), acts[..., :width])
        torch.testing.assert_close(prefix(x), decoded + skip)
    torch.testing.assert_close(levels[-1], model.decode(acts))


@given(models, st.data())
def test_truncating_twice_is_truncating_once(model: Any, data: st.DataObject) -> None:
    wide = data.draw(st.integers(1, model.cfg.d_sae))
    narrow = data.draw(st.integers(1, wide))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of widths between the trained ones
        twice = sm.truncate(sm.truncate(model, wide), narrow)
        once = sm.truncate(model, narrow)
    assert sm.matryoshka_widths(twice) == sorted(
        {*(w for w in sm.matryoshka_widths(once) if w < wide), narrow}
    )
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name


@given(models, st.integers(-2, 100))
def test_a_width_is_a_prefix_or_refused(model: Any, width: int) -> None:
    if 1 <= width <= model.cfg.d_sae:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sm.truncate(model, width).cfg.d_sae == width
    else:
        with pytest.raises(ValueError, match=f"width={width} must be an integer from 1 to"):
            sm.truncate(model, width)
