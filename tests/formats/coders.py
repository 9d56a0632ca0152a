"""Random sparse coders of every kind, and what they compute, written out."""

from __future__ import annotations

from typing import Any

import torch

from saelens_matryoshka.formats import SparseCoder

D, LATENTS, WIDTHS = 16, 48, [8, 24, 48]


def random_coder(
    activation: str = "jumprelu",
    *,
    transcoder: bool = True,
    skip: bool = False,
    layer: int = 0,
    d_out: int = D,
    uniform: bool = False,
    subtract_b_dec: bool | None = None,
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> SparseCoder:
    """A coder with random weights, biases too, whose latents fire on about a third of random inputs."""
    generator = torch.Generator().manual_seed(100 * layer + d_out)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    threshold = normal(LATENTS).abs() + 0.5
    if uniform:
        threshold = torch.full_like(threshold, 0.75)
    hooks = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    if transcoder:
        hooks = {
            "hook_name": f"blocks.{layer}.ln2.hook_normalized",
            "hook_name_out": f"blocks.{layer}.hook_mlp_out",
            "input_frame": "normalized",
        }
    return SparseCoder(
        W_enc=normal(D, LATENTS),
        b_enc=normal(LATENTS),
        W_dec=normal(LATENTS, d_out),
        b_dec=normal(d_out),
        threshold=threshold if activation == "jumprelu" else None,
        k=5 if activation == "topk" else None,
        W_skip=normal(d_out, D) if skip else None,
        subtract_b_dec=not transcoder if subtract_b_dec is None else subtract_b_dec,
        metadata={"model_name": "tiny", "matryoshka_widths": WIDTHS, **hooks, **metadata},
    )


def inputs(n: int = 64, seed: int = 0) -> torch.Tensor:
    """`[n, D]`."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def expected_output(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
    """What a coder computes, from its definition."""
    mean, std = torch.zeros(1), torch.ones(1)
    raw = x
    if coder.layer_norm:
        mean = x.mean(dim=-1, keepdim=True)
        std = (x - mean).std(dim=-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre = (x - coder.b_dec * coder.subtract_b_dec if coder.subtract_b_dec else x) @ coder.W_enc + coder.b_enc
    acts = pre.relu()
    if coder.threshold is not None:
        acts = acts * (pre > coder.threshold)
    if coder.k is not None:
        kept = torch.zeros_like(acts)
        top = acts.topk(coder.k, dim=-1)
        acts = kept.scatter(-1, top.indices, top.values)
    out = (acts @ coder.W_dec + coder.b_dec) * std + mean
    return out if coder.W_skip is None else out + raw @ coder.W_skip.T


def assert_same(found: SparseCoder, expected: SparseCoder, *, exact: bool = True) -> None:
    """The tensors are equal to the last bit, or the function is the same."""
    if not exact:
        x = inputs()
        torch.testing.assert_close(expected_output(found, x), expected_output(expected, x))
        return
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    for name in ("k", "subtract_b_dec", "layer_norm"):
        assert getattr(found, name) == getattr(expected, name), name


def assert_same_metadata(found: SparseCoder, expected: SparseCoder) -> None:
    """Nothing that a coder says of itself was lost."""
    for name, value in expected.metadata.items():
        assert found.metadata.get(name) == value, name
