"""A tiny language model inside the package: real text and real activations without a download.

The model is a small Gemma-2 trained on the Python standard library's sources; its figures are in
the model card, `weights/README.md`. The loaders give the same model behind three interfaces, all
in float32 on the CPU, and none of them reaches for the network. The text it was trained and tested
on is in `saelens_matryoshka.tiny.text`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from saelens_matryoshka.tiny import text

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "NAMES",
    "PATH",
    "load_bridge",
    "load_hf_model",
    "load_hooked_transformer",
    "load_tokenizer",
    "text",
]

NAMES = ("tiny", "saelens_matryoshka.tiny")
"""What the model is called where a language model is named."""

PATH = Path(__file__).parent / "weights"
"""Folder of the model in the Hugging Face layout: weights, config, tokenizer, model card."""

_NO_SOFT_CAP = -1.0  # how transformer_lens says it


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides progress bars and the deprecation notices of `HookedTransformer`."""
    had_progress_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # SAELens still runs on HookedTransformer, so its users can do nothing about these.
            warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
            yield
    finally:
        if had_progress_bars:
            transformers_logging.enable_progress_bar()


def load_hf_model() -> Gemma2ForCausalLM:
    """Loads the model as transformers' own class.

    Returns:
        The model in float32, in eval mode, with eager attention (the fused kernels leave out the
        soft-capping of the attention scores, so their logits differ).
    """
    with _quiet():
        return Gemma2ForCausalLM.from_pretrained(
            PATH, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Loads the tokenizer.

    Returns:
        A byte-level BPE tokenizer with `<bos>`, `<eos>` and `<pad>` that adds none of them by
        itself.
    """
    return AutoTokenizer.from_pretrained(PATH, local_files_only=True)


def load_hooked_transformer(fold_ln: bool = False) -> HookedTransformer:
    """Loads the model as transformer_lens's `HookedTransformer`.

    Args:
        fold_ln: fold the gains of the input norms and of the final norm into the weights that
            read from them. Nothing else is processed in either case.

    Returns:
        The model in float32, in eval mode, with its tokenizer.
    """
    # Imported here: transformer_lens takes seconds, and the other loaders do not need it.
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    hf_model = load_hf_model()
    config = hooked_config(hf_model.config)
    with _quiet():
        model = HookedTransformer(config, load_tokenizer())
        model.load_and_process_state_dict(
            convert_gemma_weights(hf_model, config),
            fold_ln=fold_ln,
            center_writing_weights=False,  # not valid under RMSNorm
            center_unembed=False,  # not valid under soft-capped logits
            fold_value_biases=False,  # there are none
        )
    return model.eval()


def hooked_config(config: Gemma2Config) -> HookedTransformerConfig:
    """Translates the config; transformer_lens itself knows Gemma-2 by its official names only."""
    from transformer_lens import HookedTransformerConfig

    assert config.layer_types is not None  # Gemma2Config fills it in
    return HookedTransformerConfig(
        model_name="saelens-matryoshka-tiny",
        original_architecture="Gemma2ForCausalLM",
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_activation,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=10000.0,  # Gemma-2's own; transformers 4 and 5 keep it in different fields
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        attn_scores_soft_cap=config.attn_logit_softcapping or _NO_SOFT_CAP,
        output_logits_soft_cap=config.final_logit_softcapping or _NO_SOFT_CAP,
        tie_word_embeddings=True,
        init_weights=False,
        device="cpu",
        dtype=torch.float32,
    )


def load_bridge() -> TransformerBridge:
    """Loads the model as transformer_lens's `TransformerBridge`.

    Returns:
        The model in float32, in eval mode, with its tokenizer.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with _quiet():
        bridge = TransformerBridge.boot_transformers(
            str(PATH), device="cpu", dtype=torch.float32, tokenizer=load_tokenizer()
        )
    return bridge.eval()
