"""Tiny random language models of several families, on each kind of model that SAELens trains on.

Every parameter is random, the norms' too: with the gains of 1 and the biases of 0 of a fresh
model, a site that forgets them would look right.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights,
    convert_gpt2_weights,
    convert_llama_weights,
    convert_neox_weights,
    convert_olmo2_weights,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB, D_MODEL, D_MLP, N_LAYERS, N_HEADS, D_HEAD, N_CTX = 50, 16, 32, 3, 2, 8, 32

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED_QUERY = {"num_key_value_heads": 1, "head_dim": D_HEAD}
_GPT2_LIKE = {
    "vocab_size": VOCAB,
    "n_positions": N_CTX,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def hf(model_type: str, **config: Any) -> PreTrainedModel:
    """A random model of an HF model type, with every parameter drawn from N(0, 0.3^2)."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **config), attn_implementation="eager"
    )
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def gpt2_hf() -> PreTrainedModel:
    """LayerNorm with biases, learned positions."""
    return hf("gpt2", n_inner=D_MLP, **_GPT2_LIKE)


def gptj_hf() -> PreTrainedModel:
    """One LayerNorm for attention and MLP, which run in parallel."""
    return hf("gptj", n_inner=D_MLP, rotary_dim=4, **_GPT2_LIKE)


def neox_hf() -> PreTrainedModel:
    """Pythia: attention and MLP in parallel, each with its LayerNorm."""
    return hf("gpt_neox", **_LLAMA_LIKE)


def llama_hf() -> PreTrainedModel:
    """RMSNorm, grouped queries."""
    return hf("llama", **_LLAMA_LIKE, **_GROUPED_QUERY)


def mistral_hf() -> PreTrainedModel:
    """As Llama, with a sliding window."""
    return hf("mistral", **_LLAMA_LIKE, **_GROUPED_QUERY)


def qwen2_hf() -> PreTrainedModel:
    """As Llama, with biases on the queries, keys and values."""
    return hf("qwen2", num_key_value_heads=1, **_LLAMA_LIKE)


def qwen3_hf() -> PreTrainedModel:
    """As Llama, with norms on the queries and keys."""
    return hf("qwen3", **_LLAMA_LIKE, **_GROUPED_QUERY)


def gemma2_hf() -> PreTrainedModel:
    """RMSNorms of 1 + weight before and after each sub-layer, embeddings scaled."""
    return hf("gemma2", query_pre_attn_scalar=D_HEAD, **_LLAMA_LIKE, **_GROUPED_QUERY)


def gemma3_hf() -> PreTrainedModel:
    """As Gemma-2, with norms on the queries and keys."""
    return hf("gemma3_text", query_pre_attn_scalar=D_HEAD, **_LLAMA_LIKE, **_GROUPED_QUERY)


def olmo2_hf() -> PreTrainedModel:
    """Norms only after the sub-layers: the MLP reads the residual stream itself."""
    return hf("olmo2", num_key_value_heads=N_HEADS, **_LLAMA_LIKE)


def opt_hf() -> PreTrainedModel:
    """No MLP module: a layer holds the MLP's two matrices itself."""
    config = {**_LLAMA_LIKE, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}
    del config["intermediate_size"]
    return hf("opt", **config)


def granite_hf() -> PreTrainedModel:
    """As Llama, but embeddings and sub-layers' outputs are scaled outside of any module."""
    return hf("granite", embedding_multiplier=3.0, residual_multiplier=0.5, **_LLAMA_LIKE)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words "w1" to "w49"."""
    vocabulary = {"<eos>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    # No BOS token: given one, TransformerLens loads the tokenizer anew, by its name.
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


_ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": D_HEAD}
_LLAMA: dict[str, Any] = {
    **_ROTARY,
    "normalization_type": "RMS",
    "gated_mlp": True,
    "act_fn": "silu",
    "final_rms": True,
}
# How TransformerLens describes and converts each family, by HF model type.
_CONVERSIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (convert_gpt2_weights, {"normalization_type": "LN", "act_fn": "gelu_new"}),
    "gpt_neox": (
        convert_neox_weights,
        {
            **_ROTARY,
            "normalization_type": "LN",
            "act_fn": "gelu",
            "parallel_attn_mlp": True,
            "rotary_dim": D_HEAD // 4,
        },
    ),
    "llama": (convert_llama_weights, {**_LLAMA, "n_key_value_heads": 1}),
    "gemma2": (
        convert_gemma_weights,
        {
            **_LLAMA,
            "n_key_value_heads": 1,
            "act_fn": "gelu_pytorch_tanh",
            "use_normalization_before_and_after": True,
            "use_attn_scale": True,
            "attn_scores_soft_cap": 50.0,
            "output_logits_soft_cap": 30.0,
            "use_local_attn": True,
            "window_size": 4096,
            "attn_types": ["local", "global", "local"],
        },
    ),
    "olmo2": (
        convert_olmo2_weights,
        {
            **_LLAMA,
            "original_architecture": "Olmo2ForCausalLM",
        },
    ),
}


def hooked_transformer(
    hf: PreTrainedModel, fold_ln: bool = False, use_hook_mlp_in: bool = False
) -> HookedTransformer:
    """The HF model as a HookedTransformer, unprocessed but for the folding of norms if wanted."""
    convert, settings = _CONVERSIONS[hf.config.model_type]
    eps = getattr(hf.config, "rms_norm_eps", None) or getattr(hf.config, "layer_norm_eps", 1e-5)
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=N_CTX,
        d_head=D_HEAD,
        n_heads=N_HEADS,
        d_mlp=D_MLP,
        d_vocab=VOCAB,
        eps=eps,
        device="cpu",
        init_weights=False,
        use_hook_mlp_in=use_hook_mlp_in,
        **settings,
    )
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        convert(copy.deepcopy(hf), cfg),
        fold_ln=fold_ln,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def bridge(hf: PreTrainedModel) -> TransformerBridge:
    """The HF model in a TransformerBridge, which instruments a copy of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            "tiny", hf_model=copy.deepcopy(hf), tokenizer=tokenizer(), device="cpu"
        ).eval()


def proxy(hf: PreTrainedModel, hook_names: list[str] | None = None) -> HookedProxyLM:
    """The HF model as SAELens loads an AutoModelForCausalLM."""
    return HookedProxyLM(copy.deepcopy(hf), tokenizer(), hook_names=hook_names)
