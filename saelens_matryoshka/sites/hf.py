"""The sites of a HookedProxyLM, whose hooks are the modules of a model of transformers."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from saelens_matryoshka.sites.site import SITE_NAMES, Site, check_layer

_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")


def hf_sites(hf: nn.Module, layer: int) -> dict[str, Site | str]:
    """Each site, or why no module of an HF model puts it out.

    Names do not tell: what comes out of `post_attention_layernorm` feeds the MLP in Llama and is
    added to the residual in Gemma-2, and some models rescale between modules. So the modules are
    found by what they put out: the MLP's input, and the two tensors which make the layer's output
    when they are added to its input.
    """
    calls = _calls(hf)
    layers, n_layers = _decoder_layers(hf, calls)
    check_layer(layer, n_layers)
    block = f"{layers}.{layer}"
    children = {name: call.output for name, call in calls.items() if _parent(name) == block}
    mlp = next((f"{block}.{name}" for name in _MLP_NAMES if f"{block}.{name}" in calls), None)
    if block not in calls or mlp is None:
        raise ValueError(
            f"layer={layer} ({block}) of this HookedProxyLM runs no module that is known as an "
            f"MLP ({', '.join(_MLP_NAMES)}); it runs {', '.join(children)}"
        )
    before, after = calls[block]
    sites: dict[str, Site | str] = dict.fromkeys(
        SITE_NAMES, f"no module puts it out (none of {', '.join(children)})"
    )
    sites["resid_post"] = Site(block)
    # Before layer 0 stand the decoder's embeddings, and in some models a dropout behind them.
    for name, call in calls.items():
        at_place = name == f"{layers}.{layer - 1}" if layer else _parent(name) == _parent(layers)
        if at_place and torch.equal(call.output, before):
            sites["resid_pre"] = Site(name)
    for name, output in children.items():
        if torch.equal(output, calls[mlp].input):
            sites["mlp_in"] = Site(name)
    # In the order of the calls: attention's part before the MLP's, and a sub-layer before a
    # dropout which repeats it.
    names = list(children)
    parts = [
        (attention, added)
        for added in names[names.index(mlp) :]
        for attention in names[: names.index(added)]
        if _adds_up(before, children[attention], children[added], after)
    ]
    if parts:
        sites["attn_out"], sites["mlp_out"] = map(Site, parts[0])
    return sites


class _Call(NamedTuple):
    """The first tensor which a module took, and the first which it gave."""

    input: torch.Tensor
    output: torch.Tensor


@torch.no_grad()
def _calls(hf: nn.Module) -> dict[str, _Call]:
    """What each module that runs exactly once takes and gives on a few tokens, in order."""
    calls: dict[str, list[_Call | None]] = defaultdict(list)

    def record(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        # Of a tuple, HookedProxyLM reads the first element.
        given = output[0] if isinstance(output, tuple) and output else output
        taken = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if taken is None or not isinstance(given, torch.Tensor):
            calls[name].append(None)
        else:  # on one device, for models which are spread over several
            calls[name].append(_Call(taken.to("cpu", copy=True), given.to("cpu", copy=True)))

    modules = hf.named_modules()
    handles = [m.register_forward_hook(partial(record, n), with_kwargs=True) for n, m in modules]
    try:
        hf(torch.arange(2, 6, device=next(hf.parameters()).device)[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: runs[0] for name, runs in calls.items() if len(runs) == 1 and runs[0]}


def _decoder_layers(hf: nn.Module, calls: dict[str, _Call]) -> tuple[str, int]:
    """The path and the length of the list of decoder layers: the one whose MLPs run."""
    lists = {name: m for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    with_mlps = [
        name
        for name, layers in lists.items()
        if any(f"{name}.{i}.{mlp}" in calls for i in range(len(layers)) for mlp in _MLP_NAMES)
    ]
    if len(with_mlps) != 1:
        found = {name: [child for child, _ in m[0].named_children()] for name, m in lists.items()}
        raise ValueError(
            f"{len(with_mlps)} lists of modules of {type(hf).__name__}, and not 1, are known as "
            f"decoder layers. Its lists, with the modules of their first element, are {found}"
        )
    return with_mlps[0], len(lists[with_mlps[0]])


def _adds_up(before: torch.Tensor, a: torch.Tensor, b: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether before + a + b is after to the last bit, in one of the orders of adding.

    Not within a tolerance: beside a large residual a wrong tensor would be within it.
    """
    if not before.shape == a.shape == b.shape == after.shape:
        return False
    return any(torch.equal(x, after) for x in (before + a + b, a + b + before, before + b + a))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
