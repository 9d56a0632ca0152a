"""Valid files of every format the package reads, small, from which hostile ones are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

D, LATENTS = 4, 8
ITEM = "gemma-scope-2b-pt-transcoders/layer_0/layers.0.mlp"
"""Where the files lie: the names of the folders tell some formats what they hold."""


def _matrices(encoder: str = "W_enc", decoder: str = "W_dec") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        encoder: torch.randn(D, LATENTS, generator=generator),
        decoder: torch.randn(LATENTS, D, generator=generator),
        "b_enc": torch.zeros(LATENTS),
        "b_dec": torch.zeros(D),
    }


def _saelens(architecture: str, **fields: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        hooks = {"hook_name": "blocks.0.ln2.hook_normalized", "hook_name_out": "blocks.0.hook_mlp_out"}
        metadata = {"sae_lens_version": "6.54.0", "model_name": "tiny", "matryoshka_widths": [2, 8]}
        cfg = {"architecture": architecture, "d_in": D, "d_sae": LATENTS, "dtype": "float32", "device": "cpu"}
        cfg |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
        cfg |= {"reshape_activations": "none", "metadata": {**metadata, **hooks}, **fields}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        tensors = _matrices()
        if "jumprelu" in architecture:
            tensors["threshold"] = torch.ones(LATENTS)
        if "skip" in architecture:
            tensors["W_skip"] = torch.eye(D)
        save_file(tensors, folder / "sae_weights.safetensors")
        row = {"width": 8, "fvu": 0.5, "l0": 3.0, "dead_fraction": 0.1, "ce_recovered": 0.9, "kl": 0.1}
        (folder / "evaluation.json").write_text(json.dumps({"prefixes": [row], "n_tokens": 100}))

    return write


def _sparsify(folder: Path) -> None:
    cfg = {"activation": "topk", "expansion_factor": 2, "num_latents": LATENTS, "k": 3, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "skip_connection": False, "transcode": True}))
    made = _matrices()
    tensors = {"encoder.weight": made["W_enc"].T.contiguous(), "encoder.bias": made["b_enc"]}
    tensors |= {"W_dec": made["W_dec"], "b_dec": made["b_dec"]}
    save_file(tensors, folder / "sae.safetensors", metadata={"saelens_matryoshka": '{"context_size": 8}'})


def _dictionary_learning(dict_class: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": LATENTS, "k": 3, "layer": 0}
        trainer |= {"lm_name": "tiny", "submodule_name": "resid_post_layer_0"}
        config = {"trainer": trainer, "buffer": {"ctx_len": 16}, "saelens_matryoshka": {"context_size": 8}}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = _matrices()
        if dict_class in ("BatchTopKSAE", "AutoEncoderTopK"):
            tensors["encoder.weight"] = tensors.pop("W_enc").T.contiguous()
            tensors["decoder.weight"] = tensors.pop("W_dec").T.contiguous()
            tensors["encoder.bias"] = tensors.pop("b_enc")
        if dict_class == "JumpReluAutoEncoder":
            tensors["threshold"] = torch.ones(LATENTS)
        else:
            tensors |= {"threshold": torch.tensor(0.5), "k": torch.tensor(3)}
        if dict_class.startswith("Matryoshka"):
            tensors["group_sizes"] = torch.tensor([2, 6])
        torch.save(tensors, folder / "ae.pt")

    return write


def _circuit_tracer(folder: Path) -> None:
    config = {"model_name": "tiny", "model_kind": "transcoder_set", "transcoders": ["layer_0.safetensors"]}
    config |= {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "activation": "jumprelu", "k": 3}))
    tensors = {**_matrices(), "W_skip": torch.eye(D), "activation_function.threshold": torch.ones(LATENTS)}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    note = json.dumps({"matryoshka_widths": [2, 8], "context_size": 8})
    save_file(tensors, folder / "layer_0.safetensors", metadata={"saelens_matryoshka": note})


def _gemma_scope(folder: Path) -> None:
    tensors = {**_matrices(), "threshold": torch.ones(LATENTS)}
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})


def _gemma_scope_2(folder: Path) -> None:
    config = {"architecture": "jump_relu", "affine_connection": True, "model_name": "google/gemma-v3-1b"}
    config |= {"hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output"}
    config |= {"hf_hook_point_out": "model.layers.0.post_feedforward_layernorm.output"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {**_matrices("w_enc", "w_dec"), "threshold": torch.ones(LATENTS)}
    save_file({**tensors, "affine_skip_connection": torch.eye(D)}, folder / "params.safetensors")


def _llamascopium(folder: Path) -> None:
    config = {"sae_type": "sae", "hook_point_in": "blocks.0.hook_in", "hook_point_out": "blocks.0.hook_out"}
    config |= {"d_model": D, "expansion_factor": 2, "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    (folder / "config.json").write_text(json.dumps({**config, "use_decoder_bias": True, "top_k": 3}))
    made = _matrices("W_E", "W_D")
    tensors = {"W_E": made["W_E"], "W_D": made["W_D"], "b_E": made["b_enc"], "b_D": made["b_dec"]}
    tensors["activation_function.log_jumprelu_threshold"] = torch.zeros(LATENTS)
    for hook in ("blocks.0.hook_in", "blocks.0.hook_out"):
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(2.0)
    save_file(tensors, folder / "sae_weights.safetensors")


def _matryoshka_checkpoint(folder: Path) -> None:
    config = {"sae_type": "global-matryoshka-topk", "hook_point": "blocks.0.hook_resid_post"}
    config |= {"model_name": "tiny", "dataset_path": "text", "seq_len": 16, "dict_size": LATENTS, "top_k": 3}
    config |= {"group_sizes": [2, 6], "input_unit_norm": True}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**_matrices(), "threshold": torch.tensor(0.5)}, folder / "final.pt")


SEEDS: list[tuple[str, Callable[[Path], None]]] = [
    ("saelens", _saelens("jumprelu_skip_transcoder", d_out=D)),
    ("saelens", _saelens("topk", k=3, rescale_acts_by_decoder_norm=False)),
    ("sparsify", _sparsify),
    ("dictionary-learning", _dictionary_learning("MatryoshkaBatchTopKSAE")),
    ("dictionary-learning", _dictionary_learning("AutoEncoderTopK")),
    ("dictionary-learning", _dictionary_learning("JumpReluAutoEncoder")),
    ("circuit-tracer", _circuit_tracer),
    ("gemma-scope", _gemma_scope),
    ("gemma-scope-2", _gemma_scope_2),
    ("llamascopium", _llamascopium),
    ("matryoshka-checkpoint", _matryoshka_checkpoint),
]
"""Each format, and what writes a folder in it."""
