"""A site is the tensor which the HF model itself has at that place, on every kind of model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_matryoshka.sites import (
    SITE_NAMES,
    Site,
    check_hook,
    find_site,
    hook_names,
    norm_frame,
    norm_gain,
)
from tests import tiny_models

TOKENS = torch.randint(1, tiny_models.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
LAYERS = (0, 1, tiny_models.N_LAYERS - 1)
FAMILIES = ("gpt2", "llama", "gemma2", "neox", "olmo2")
HF_ONLY_FAMILIES = ("gptj", "mistral", "qwen2", "qwen3", "gemma3")
KINDS = {
    "hooked_transformer": tiny_models.hooked_transformer,
    "hooked_transformer_with_hook_mlp_in": partial(tiny_models.hooked_transformer, use_hook_mlp_in=True),
    "bridge": tiny_models.bridge,
    "proxy": tiny_models.proxy,
}
PARALLEL, POST_NORM = ("neox", "gptj"), ("olmo2",)
HOOKED_BEFORE_POST_NORMS = Version(version("transformer-lens")) < Version("3.7.2")

assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small lose more time to threads than they gain."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@cache
def hf(family: str) -> Any:
    return getattr(tiny_models, f"{family}_hf")()


@cache
def model(family: str, kind: str) -> Any:
    """Shared between tests: do not change it."""
    return KINDS[kind](hf(family))


@cache
def folded(family: str) -> HookedTransformer:
    return tiny_models.hooked_transformer(hf(family), fold_ln=True)


def layers_of(hf_model: Any) -> nn.ModuleList:
    [layers] = (module for module in hf_model.modules() if isinstance(module, nn.ModuleList))
    return layers


def mlp_norm_of(family: str, hf_layer: Any) -> Any:
    """The norm before the MLP, written down by hand: the truth which find_site has to find."""
    name = {
        "gpt2": "ln_2",
        "gptj": "ln_1",
        "gemma2": "pre_feedforward_layernorm",
        "gemma3": "pre_feedforward_layernorm",
    }.get(family, "post_attention_layernorm")
    return getattr(hf_layer, name)


@cache
def truth(family: str, layer: int) -> dict[str, torch.Tensor]:
    """The tensors of the HF model, by its own modules' inputs and outputs."""
    hf_layer = layers_of(hf(family))[layer]
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken = args[0] if args else kwargs["hidden_states"]
        given = output[0] if isinstance(output, tuple) else output
        seen[f"{name}.in"], seen[f"{name}.out"] = taken.clone(), given.clone()

    modules = {"layer": hf_layer, "mlp": hf_layer.mlp}
    if family not in POST_NORM:
        modules["norm"] = mlp_norm_of(family, hf_layer)
    handles = [
        module.register_forward_hook(partial(record, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    with torch.no_grad():
        hf(family)(TOKENS)
    for handle in handles:
        handle.remove()

    found = {"resid_pre": seen["layer.in"], "resid_post": seen["layer.out"]}
    found["mlp_in"] = seen["mlp.in"]
    if family in PARALLEL:
        found["mlp_out"] = seen["mlp.out"]
        found["attn_out"] = found["resid_post"] - found["resid_pre"] - found["mlp_out"]
    else:
        found["resid_mid"] = seen["mlp.in"] if family in POST_NORM else seen["norm.in"]
        found["mlp_out"] = found["resid_post"] - found["resid_mid"]
        found["attn_out"] = found["resid_mid"] - found["resid_pre"]
    if family not in POST_NORM:
        gain, offset = gain_and_offset(family, modules["norm"])
        found["ln2_normalized"] = (seen["norm.out"] - offset) / gain
    return found


def gain_and_offset(family: str, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    gain = norm.weight.detach() + (1 if family.startswith("gemma") else 0)
    offset = getattr(norm, "bias", None)
    return gain, torch.zeros_like(gain) if offset is None else offset.detach()


def scales_outside_modules(family: str) -> bool:
    """Whether no module puts out the embeddings as layer 0 reads them: Gemma-2 before transformers 5."""
    return family == "gemma2" and type(hf(family).model.embed_tokens) is nn.Embedding


def is_absent(family: str, kind: str, name: str, layer: int) -> bool:
    """Whether this kind of model has no hook for the site."""
    if kind == "proxy" and name == "resid_pre" and layer == 0:
        return scales_outside_modules(family)
    if kind == "proxy" and name in ("resid_mid", "ln2_normalized"):
        return True
    if name == "resid_mid":
        return family in PARALLEL
    if name in ("attn_out", "mlp_out") and HOOKED_BEFORE_POST_NORMS and kind != "proxy":
        return family in POST_NORM
    if name == "ln2_normalized":
        return family in (*POST_NORM, "gptj")  # the bridge's GPT-J has one norm, ln1
    return kind == "proxy" and name == "mlp_in" and family in POST_NORM


def read(model: Any, site: Site, layer: int) -> torch.Tensor:
    """The site's tensor, with the call that SAELens's activation store makes."""
    with torch.no_grad():
        _, activations = model.run_with_cache(TOKENS, names_filter=[site.hook_name], stop_at_layer=layer + 1)
    return site(activations[site.hook_name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_compute_what_the_hf_model_computes(family: str, kind: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            model(family, kind)(TOKENS), hf(family)(TOKENS).logits, atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", SITE_NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_site_is_the_hf_models_tensor(family: str, kind: str, name: str) -> None:
    for layer in LAYERS:
        if is_absent(family, kind, name, layer):
            with pytest.raises(ValueError, match=f"name='{name}' has no hook at layer={layer}"):
                find_site(model(family, kind), layer, name)
        else:
            site = find_site(model(family, kind), layer, name)
            assert_close(read(model(family, kind), site, layer), truth(family, layer)[name])


@pytest.mark.parametrize("kind", ["bridge", "proxy"])
@pytest.mark.parametrize("family", HF_ONLY_FAMILIES)
def test_sites_of_more_families(family: str, kind: str) -> None:
    for name in SITE_NAMES:
        if not is_absent(family, kind, name, layer=1):
            site = find_site(model(family, kind), 1, name)
            assert_close(read(model(family, kind), site, 1), truth(family, 1)[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_truth_agrees_with_hf_hidden_states(family: str) -> None:
    with torch.no_grad():
        states = hf(family)(TOKENS, output_hidden_states=True).hidden_states
    for layer in range(tiny_models.N_LAYERS):
        torch.testing.assert_close(truth(family, layer)["resid_pre"], states[layer])
    torch.testing.assert_close(truth(family, 0)["resid_post"], states[1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_folded_norms(family: str) -> None:
    """With folded norms the MLP reads the normalised residual, in another frame than HF's."""
    site = find_site(folded(family), 1, "mlp_in")
    assert site == Site("blocks.1.ln2.hook_normalized")
    received = []
    handle = folded(family).blocks[1].mlp.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    tensor = read(folded(family), site, 1)
    handle.remove()
    assert_close(tensor, received[0])
    assert not torch.allclose(tensor, truth(family, 1)["mlp_in"], atol=0.1)
    assert norm_frame(folded(family), site.hook_name) == "normalized_folded"
    with pytest.raises(ValueError, match="folded into the next layer: load the model with no"):
        norm_gain(folded(family), site.hook_name)
    assert_close(
        read(folded(family), find_site(folded(family), 1, "mlp_out"), 1),
        truth(family, 1)["mlp_out"],
    )


def test_model_whose_layers_hold_the_mlps_matrices_themselves() -> None:
    opt = tiny_models.opt_hf()
    bridge = tiny_models.bridge(opt)
    received = []
    first_matrix = opt.model.decoder.layers[1].fc1
    handle = first_matrix.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    with torch.no_grad():
        opt(TOKENS)
    handle.remove()
    tensor = read(bridge, find_site(bridge, 1, "mlp_in"), 1)
    assert_close(tensor, received[0].view_as(tensor))
    with pytest.raises(ValueError, match=r"^0 lists of modules.*self_attn.*fc1"):
        find_site(tiny_models.proxy(opt), 1, "mlp_in")


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_bridge_in_compatibility_mode(family: str) -> None:
    """There the bridge keeps its norms, but idle: their weights were folded."""
    bridge = tiny_models.bridge(hf(family))
    hook = find_site(bridge, 1, "ln2_normalized").hook_name
    assert norm_frame(bridge, hook) == "normalized"
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert norm_frame(bridge, hook) == "normalized"
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert norm_frame(bridge, hook) == "normalized_folded"
    with pytest.raises(ValueError, match="folded into the next layer"):
        norm_gain(bridge, hook)
    assert_close(read(bridge, find_site(bridge, 1, "mlp_in"), 1), read(bridge, Site(hook), 1))


@pytest.mark.parametrize("kind", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_norm_gain(family: str, kind: str) -> None:
    found = norm_gain(model(family, kind), "blocks.1.ln2.hook_normalized")
    gain, offset = gain_and_offset(family, mlp_norm_of(family, layers_of(hf(family))[1]))
    assert_close(found.gain, gain)
    assert (found.offset is None) == (family in ("llama", "gemma2"))
    if found.offset is not None:
        assert_close(found.offset, offset)
    assert not found.gain.requires_grad
    assert norm_frame(model(family, kind), "blocks.1.ln2.hook_normalized") == "normalized"


def test_norm_gain_does_not_trust_the_bridges_config() -> None:
    """On some architectures its flag for norms of 1 + weight does not fit the norm."""
    for family, flag in (("gemma2", False), ("llama", True)):
        bridge = tiny_models.bridge(hf(family))
        bridge.cfg.rmsnorm_uses_offset = flag
        found = norm_gain(bridge, "blocks.1.ln2.hook_normalized")
        assert_close(found, norm_gain(model(family, "hooked_transformer"), "blocks.1.ln2.hook_normalized"))


@pytest.mark.parametrize("kind", ["hooked_transformer", "bridge", "proxy"])
def test_norm_gain_of_another_hook(kind: str) -> None:
    hook = find_site(model("llama", kind), 1, "mlp_out").hook_name
    with pytest.raises(ValueError, match=f"input_gain='norm_weight'.*'{hook}'.*input_gain='none'"):
        norm_gain(model("llama", kind), hook)
    assert norm_frame(model("llama", kind), hook) == "raw"


def test_norm_frame_of_a_missing_norm() -> None:
    with pytest.raises(ValueError, match=r"hook_name='blocks.9.ln2.hook_normalized' is not a hook"):
        norm_frame(model("llama", "hooked_transformer"), "blocks.9.ln2.hook_normalized")


def small_config(**settings: Any) -> HookedTransformer:
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=2, d_model=8, n_ctx=8, d_head=4, d_vocab=50, device="cpu", **settings
        )
    )


def test_attention_only_transformer() -> None:
    attention_only = small_config(attn_only=True)
    for name in ("mlp_in", "mlp_out", "resid_mid", "ln2_normalized"):
        with pytest.raises(ValueError, match=r"attn_only.*resid_pre, resid_post, attn_out"):
            find_site(attention_only, 1, name)
    read(attention_only, find_site(attention_only, 1, "attn_out"), 1)


@pytest.mark.parametrize(("parallel", "hook"), [(False, "hook_resid_mid"), (True, "hook_resid_pre")])
def test_transformer_without_norms(parallel: bool, hook: str) -> None:
    plain = small_config(act_fn="relu", normalization_type=None, parallel_attn_mlp=parallel)
    received = []
    plain.blocks[1].mlp.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    site = find_site(plain, 1, "mlp_in")
    assert site == Site(f"blocks.1.{hook}")
    assert_close(read(plain, site, 1), received[0])
    with pytest.raises(ValueError, match="no norms"):
        find_site(plain, 1, "ln2_normalized")


def test_names_of_the_hf_modules() -> None:
    names = {
        family: [
            find_site(model(family, "proxy"), 1, name).hook_name
            for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        ]
        for family in ("gpt2", "llama", "gemma2", "neox")
    }
    assert names == {
        "gpt2": [
            "transformer.h.0",
            "transformer.h.1.attn",
            "transformer.h.1.mlp",
            "transformer.h.1",
        ],
        "llama": [f"model.layers.{x}" for x in ("0", "1.self_attn", "1.mlp", "1")],
        "gemma2": [
            f"model.layers.{x}"
            for x in ("0", "1.post_attention_layernorm", "1.post_feedforward_layernorm", "1")
        ],
        "neox": [f"gpt_neox.layers.{x}" for x in ("0", "1.attention", "1.mlp", "1")],
    }
    first = {
        "gpt2": "transformer.drop",
        "llama": "model.embed_tokens",
        "gemma2": "model.embed_tokens",
        "neox": "gpt_neox.emb_dropout",
    }
    for family, hook_name in first.items():
        if not scales_outside_modules(family):
            assert find_site(model(family, "proxy"), 0, "resid_pre").hook_name == hook_name


def test_hf_model_which_rescales_between_modules() -> None:
    granite = model("granite", "proxy")
    for name in ("attn_out", "mlp_out"):
        with pytest.raises(ValueError, match=r"no module puts it out.*resid_pre, resid_post, mlp_in"):
            find_site(granite, 1, name)
    with pytest.raises(ValueError, match="name='resid_pre' has no hook at layer=0"):
        find_site(granite, 0, "resid_pre")
    assert find_site(granite, 1, "mlp_in").hook_name == "model.layers.1.post_attention_layernorm"


def test_hf_model_in_bfloat16() -> None:
    proxy = tiny_models.proxy(tiny_models.gemma2_hf().bfloat16())
    for name in ("attn_out", "mlp_in", "mlp_out"):
        assert find_site(proxy, 1, name) == find_site(model("gemma2", "proxy"), 1, name)


class Toy(nn.Module):
    """Stacks of two layers which add an MLP's output, without attention, run `n_runs` times."""

    def __init__(self, n_stacks: int, n_runs: int = 1) -> None:
        super().__init__()
        self.n_runs = n_runs
        self.embed = nn.Embedding(50, 4)
        self.stacks = nn.ModuleList(self.stack() for _ in range(n_stacks))

    def stack(self) -> nn.ModuleDict:
        layers = (nn.ModuleDict({"mlp": nn.Linear(4, 4)}) for _ in range(2))
        return nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for stack in list(self.stacks) * self.n_runs:
            for layer in stack["layers"]:
                x = x + layer["mlp"](x)
        return x


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        (Toy(n_stacks=2), r"^2 lists of modules of Toy.*'stacks.1.layers'"),
        (Toy(n_stacks=1, n_runs=2), r"^0 lists of modules of Toy"),
        (Toy(n_stacks=1), r"layer=0 \(stacks.0.layers.0\).*it runs .*mlp"),
    ],
)
def test_hf_structures_which_are_not_known(toy: Toy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_site(HookedProxyLM(toy, tiny_models.tokenizer()), 0, "mlp_in")


def test_hf_model_with_some_modules_instrumented() -> None:
    proxy = tiny_models.proxy(hf("llama"), hook_names=["model.layers.1.mlp"])
    assert find_site(proxy, 0, "mlp_in") == Site("model.layers.0.post_attention_layernorm")
    check_hook(proxy, "model.layers.0.post_attention_layernorm", "hook_name")
    assert "model.layers.2.mlp" in hook_names(proxy)
    # Nothing is left on the model by finding a site.
    assert not proxy.model.model.layers[0].mlp._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_model(kind: str) -> None:
    compiled = torch.compile(model("gpt2", kind))
    expected = find_site(model("gpt2", kind), 1, "mlp_in").hook_name
    assert find_site(compiled, 1, "mlp_in").hook_name == expected
    assert hook_names(compiled) == hook_names(model("gpt2", kind))
    check_hook(compiled, expected, "hook_name")


@pytest.mark.parametrize("kind", ["hooked_transformer", "bridge", "proxy"])
def test_wrong_layer_or_name(kind: str) -> None:
    for layer in (3, 12, -1):
        with pytest.raises(ValueError, match=rf"layer={layer}, but the model has 3 layers \(0 to 2\)"):
            find_site(model("llama", kind), layer, "mlp_in")
    with pytest.raises(ValueError, match=r"name='mlp_input' .* did you mean 'mlp_in'.*resid_pre"):
        find_site(model("llama", kind), 1, "mlp_input")


def test_unknown_kind_of_model() -> None:
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM; find_site knows"):
        find_site(hf("llama"), 1, "mlp_in")


def test_a_model_without_hooks_is_told() -> None:
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM, which has no hooks"):
        check_hook(hf("llama"), "blocks.1.hook_mlp_out", "hook_name")


def test_an_sae_attached_to_the_model_is_told() -> None:
    transformer = HookedSAETransformer(model("llama", "hooked_transformer").cfg)
    width, name = transformer.cfg.d_model, "blocks.1.hook_mlp_out"
    transformer.add_sae(StandardSAE(StandardSAEConfig(width, 4, metadata=SAEMetadata(hook_name=name))))
    with pytest.raises(ValueError, match="hook_name='blocks.1.hook_mlp_out' has an SAE attached"):
        check_hook(transformer, name, "hook_name")
    with pytest.warns(UserWarning, match="an SAE attached at 'blocks.1.hook_mlp_out': .*reset_saes"):
        check_hook(transformer, "blocks.2.hook_mlp_out", "hook_name")
    transformer.reset_saes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hook(transformer, "blocks.2.hook_mlp_out", "hook_name")


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_name_can_be_checked(kind: str) -> None:
    for name in hook_names(model("gemma2", kind)):
        check_hook(model("gemma2", kind), name, "hook_name")


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("hooked_transformer", "blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"),
        ("bridge", "blocks.1.ln2.hook_normalised", "blocks.1.ln2.hook_normalized"),
        ("proxy", "model.layer.1.mlp", "model.layers.1.mlp"),
        ("proxy", "model.layers", "model.layers.0"),  # a list, which is never called
    ],
)
def test_check_hook_names_the_near_hooks(kind: str, wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"hook_name_out='{wrong}' is not a hook.*'{right}'"):
        check_hook(model("llama", kind), wrong, "hook_name_out")


def test_check_hook_far_from_every_hook() -> None:
    with pytest.raises(ValueError, match=r"its hooks have names like '\w+"):
        check_hook(model("llama", "proxy"), "???", "hook_name")


@pytest.mark.parametrize("kind", ["hooked_transformer", "bridge"])
def test_a_hook_which_is_switched_off(kind: str) -> None:
    hook = "blocks.1.hook_mlp_in"
    assert hook not in hook_names(model("llama", kind))
    with pytest.raises(ValueError, match=r"use_hook_mlp_in is off: call model.set_use_hook_mlp_in"):
        check_hook(model("llama", kind), hook, "hook_name")
    check_hook(model("llama", "hooked_transformer_with_hook_mlp_in"), hook, "hook_name")


def test_site_computes_in_float32() -> None:
    gain, offset = torch.tensor([1.0, 1 + 2**-12]), torch.tensor([0.0, 2**-12])
    activation = torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)
    site = Site("hook", gain, offset)
    assert site(activation).dtype == torch.bfloat16
    assert torch.equal(site(activation), (activation.float() * gain + offset).bfloat16())
    assert torch.equal(site(activation.double()), activation.double() * gain + offset)
    assert Site("hook")(activation) is activation


def test_sites_with_equal_gains_are_equal() -> None:
    gain = torch.rand(4)
    assert Site("hook", gain) == Site("hook", gain.clone())
    assert Site("hook", gain) != Site("hook", gain + 1)
    assert Site("hook", gain) != Site("hook")
    assert len({Site("hook", gain), Site("hook", gain.clone())}) == 1
