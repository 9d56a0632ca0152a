"""The shape of a language model by its name, without its weights.

A `ModelShape` builds the model as the runner would see it: on the meta device, where it takes no memory, to
count what it will take; or on a real one with random weights and few layers, to time it.
"""

from __future__ import annotations

import copy
import difflib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_official_model_name, get_pretrained_model_config
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saelens_matryoshka import tiny

_TABLE = Path(__file__).with_name("model_shapes.yaml")
_VARIANT = re.compile(r"(-deduped)?(-v0|-seed\d+)?$|-Base$")
_HF_CLASS = "AutoModelForCausalLM"


@dataclass(frozen=True)
class ModelShape:
    """A language model without its weights."""

    name: str
    config: Any
    """a HookedTransformerConfig, or the config of a Hugging Face model"""

    @property
    def n_layers(self) -> int:
        """Transformer blocks."""
        return self.config.num_hidden_layers if self.is_hf else self.config.n_layers

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest prompt."""
        return self.config.max_position_embeddings if self.is_hf else self.config.n_ctx

    @property
    def is_hf(self) -> bool:
        """Whether the runner would load it as a Hugging Face model."""
        return not hasattr(self.config, "d_model")

    def build(self, device: str, *, n_layers: int | None = None, d_vocab: int | None = None) -> Any:
        """The model, with random weights; on "meta" without any.

        Args:
            device: Where to.
            n_layers: Fewer layers than it has.
            d_vocab: Fewer tokens than it knows.
        """
        config = copy.deepcopy(self.config)
        make = _hf_model if self.is_hf else _hooked_transformer
        with torch.device(device):
            model = make(config, device, n_layers or self.n_layers, d_vocab).eval()
            if device != "meta":
                _randomise(model)
        return model


def _hooked_transformer(config: Any, device: str, n_layers: int, d_vocab: int | None) -> HookedTransformer:
    config.device, config.tokenizer_name, config.n_layers = device, None, n_layers
    config.init_weights = False
    if config.attn_types is not None:
        config.attn_types = config.attn_types[:n_layers]
    if d_vocab is not None:
        config.d_vocab = config.d_vocab_out = min(d_vocab, config.d_vocab)
    return HookedTransformer(config, move_to_device=False)


def _hf_model(config: Any, _device: str, n_layers: int, d_vocab: int | None) -> HookedProxyLM:
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:n_layers]
    if d_vocab is not None:
        config.vocab_size = min(d_vocab, config.vocab_size)
    tokenizer: Any = None
    return HookedProxyLM(AutoModelForCausalLM.from_config(config), tokenizer)


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.normal_(std=0.02)


def model_shape(cfg: LanguageModelSAERunnerConfig[Any]) -> ModelShape:
    """The shape of a runner config's language model.

    From what TransformerLens knows of it, a table of this package's, a local folder, or the config.json of
    the hub if it is in the cache or can be fetched.

    Raises:
        ValueError: no one knows the model, or its config.json cannot be fetched.
    """
    kwargs = dict(cfg.model_from_pretrained_kwargs or {})
    dtype = _dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
    as_hf = cfg.model_class_name == _HF_CLASS
    if cfg.model_name in tiny.NAMES:
        hf = AutoConfig.from_pretrained(tiny.PATH, local_files_only=True)
        return _with_dtype(ModelShape("tiny", hf if as_hf else tiny.hooked_config(hf)), dtype)  # type: ignore[arg-type]
    if cfg.model_class_name not in (_HF_CLASS, "HookedTransformer"):
        raise ValueError(
            f"model_class_name={cfg.model_class_name!r}: HookedTransformer and {_HF_CLASS} are known."
        )
    wanted = {key: kwargs[key] for key in ("n_ctx", "first_n_layers") if key in kwargs}
    try:
        config = _hf_config(cfg.model_name) if as_hf else hooked_config(cfg.model_name, **wanted)
    except OSError as error:
        raise ValueError(
            f"model_name={cfg.model_name!r}: its shape is not known here, and its config.json cannot be "
            "fetched from the hub. Give a folder with a config.json, or try again with access to the hub."
        ) from error
    return _with_dtype(ModelShape(cfg.model_name, config), dtype)


def _with_dtype(shape: ModelShape, dtype: torch.dtype) -> ModelShape:
    shape.config.dtype = dtype
    return shape


def _dtype(given: Any) -> torch.dtype:
    if given is None:
        return torch.float32
    found = (
        given if isinstance(given, torch.dtype) else getattr(torch, str(given).removeprefix("torch."), None)
    )
    if not isinstance(found, torch.dtype):
        raise ValueError(f"model_from_pretrained_kwargs: dtype={given!r} is no data type of torch.")
    return found


@cache
def _table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(_TABLE.read_text())


def _hf_config(name: str) -> Any:
    known = _table().get(_VARIANT.sub("", name))
    return AutoConfig.from_pretrained(name) if known is None else AutoConfig.for_model(**known)


def hooked_config(name: str, **kwargs: Any) -> Any:
    """TransformerLens's config of a model; what its own tables lack, it converts from Hugging Face's.

    Args:
        name: As TransformerLens knows it, or a folder.
        kwargs: Passed on to TransformerLens: n_ctx, first_n_layers.

    Raises:
        ValueError: TransformerLens does not know the name.
        OSError: the config.json is not in the cache, and the hub cannot be reached.
    """
    if Path(name).is_dir():
        return get_pretrained_model_config(name, device="cpu", **kwargs)
    with naming_similar_models(name, f"model_name={name!r}"):
        official = get_official_model_name(name)
    known = _table().get(official) or _table().get(_VARIANT.sub("", official))
    if known is None:
        return get_pretrained_model_config(official, device="cpu", **kwargs)
    hf = AutoConfig.for_model(**known)
    hf.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf.model_type]]
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        config = get_pretrained_model_config(folder, device="cpu", **kwargs)
    config.model_name = official.rpartition("/")[2]
    return config


@contextmanager
def naming_similar_models(name: str, said: str) -> Iterator[None]:
    """Within, TransformerLens's error for a name that it does not know is a line, not all that it knows.

    Args:
        name: Which it is asked for.
        said: How the message calls it.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{name} not found"):
            raise
        close = difflib.get_close_matches(name, [*OFFICIAL_MODEL_NAMES, *tiny.NAMES], n=3)
        similar = f" Similar: {', '.join(close)}." if close else ""
        raise ValueError(f"{said} is not one that TransformerLens knows.{similar}") from None
