"""The formats by name, and what SAELens's `converter=` takes.

SAE.from_pretrained("EleutherAI/sae-...", "layers.3.mlp", converter=converter("sparsify"))
SAE.load_from_disk("downloads/layers.3.mlp", converter=converter("sparsify"))
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import DTYPE_TO_STR

from saelens_matryoshka.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llamascopium,
    matryoshka_checkpoint,
    saelens,
    sparsify,
)
from saelens_matryoshka.formats.coder import SparseCoder, StateDict, to_saelens
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.formats.layout import Writer
from saelens_matryoshka.formats.sources import Folder, HubRepository, Source
from saelens_matryoshka.sites import block_hook
from saelens_matryoshka.widths import cumulative_widths


@dataclass(frozen=True)
class Format:
    """How one tool keeps its models."""

    items: Callable[[Source, str], list[str]]
    """what a source holds at or below a path, each as `load` takes it"""
    load: Callable[[Source, str], SparseCoder]
    """reads one of them"""
    writer: Callable[[Path, bool], Writer] | None = None
    """writes some, of a folder and whether there will be several; None: this format is only read"""

    def save(self, coders: Sequence[SparseCoder], out: Path) -> None:
        """Write models into an empty folder.

        Raises:
            FormatError: the format is only read, or cannot carry them.
        """
        if self.writer is None:
            raise FormatError("This format is only read.")
        writer = self.writer(out, len(coders) > 1)
        for index, coder in enumerate(coders):
            writer.add(coder, f"model_{index}")
        writer.close()


FORMATS: dict[str, Format] = {
    "saelens": Format(saelens.items, saelens.load, saelens.Writer),
    "sparsify": Format(sparsify.items, sparsify.load, sparsify.Writer),
    "dictionary-learning": Format(
        dictionary_learning.items, dictionary_learning.load, dictionary_learning.Writer
    ),
    "circuit-tracer": Format(circuit_tracer.items, circuit_tracer.load, circuit_tracer.Writer),
    "gemma-scope": Format(gemma_scope.items_1, gemma_scope.load_1),
    "gemma-scope-2": Format(gemma_scope.items_2, gemma_scope.load_2),
    "llamascopium": Format(llamascopium.items, llamascopium.load),
    "matryoshka-checkpoint": Format(matryoshka_checkpoint.items, matryoshka_checkpoint.load),
}


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        FormatError: there is none.
    """
    if name not in FORMATS:
        raise FormatError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True)
class Unstated:
    """What the user knows and a file does not say."""

    widths: Sequence[int] | None = None
    """cumulative widths or group sizes of the nested levels"""
    hook_name: str | None = None
    """hook of the source; "{layer}" in it stands for the layer"""
    hook_name_out: str | None = None
    """hook of the target; "{layer}" in it stands for the layer"""
    model_name: str | None = None
    """the language model, as SAELens loads it"""
    threshold: float | None = None
    """a threshold for every latent, in place of a TopK coder's k"""

    def applied(self, coder: SparseCoder, layer: int | None, label: str) -> SparseCoder:
        """The coder with all that is known of it.

        Args:
            coder: As a format read it.
            layer: Its layer, if its own metadata do not tell it.
            label: What to call it in messages.

        Raises:
            FormatError: its hook is still unknown, or the widths do not fit.
        """
        block = block_hook(coder.metadata.get("hook_name"))
        layer = block[0] if block else layer
        hooks = {"hook_name": self.hook_name, "hook_name_out": self.hook_name_out}
        for name, hook in hooks.items():
            if hook is not None and not hook.strip():
                raise FormatError(f"{name}={hook!r} is no hook: name one, e.g. 'blocks.3.hook_resid_post'.")
        given: dict[str, Any] = {name: _at_layer(hook, layer, name) for name, hook in hooks.items() if hook}
        if any(coder.metadata.get(name) != hook for name, hook in given.items()):
            # what the file says of its own hooks is not said of these
            given |= dict.fromkeys(("input_frame", "hf_hook_name", "hf_hook_name_out"))
        if self.model_name:
            given["model_name"] = self.model_name
        coder = coder.with_metadata(**given)
        if coder.metadata.get("hook_name") is None:
            raise FormatError(
                f"{label}: nothing tells which hook it reads. Give it: "
                "hook_name='blocks.3.hook_resid_post', and for a transcoder "
                "hook_name_out='blocks.3.hook_mlp_out' (--hook-name, --hook-name-out)."
            )
        if self.threshold is not None:
            threshold = torch.full_like(coder.b_enc, self.threshold)
            coder = coder.with_tensors(threshold=threshold, k=None)
        widths = self.widths or coder.metadata.get("matryoshka_widths")
        if widths:
            try:
                widths = cumulative_widths(list(widths), coder.d_sae)
            except (ValueError, TypeError) as error:
                raise FormatError(f"{label}: {error}") from None
            coder = coder.with_metadata(matryoshka_widths=widths)
        return coder


def _at_layer(hook: str, layer: int | None, name: str) -> str:
    if other := re.search(r"\{.*?\}", hook.replace("{layer}", "")):
        raise FormatError(f"{name}={hook!r}: {other[0]} stands for nothing; {{layer}} stands for the layer.")
    if "{layer}" not in hook:
        return hook
    if layer is None:
        raise FormatError(f"{name}={hook!r}: the layer is not known; write its number in place of {{layer}}.")
    return hook.replace("{layer}", str(layer))


@dataclass(frozen=True)
class Converter:
    """Reads one format, as SAELens's `SAE.from_pretrained` and `SAE.load_from_disk` want it."""

    format: str
    given: Unstated = Unstated()

    def __call__(
        self,
        path: str | Path | None = None,
        device: str | None = "cpu",
        cfg_overrides: dict[str, Any] | None = None,
        *,
        repo_id: str | None = None,
        folder_name: str = "",
        force_download: bool = False,
    ) -> Any:
        """Of a path on disk `(cfg_dict, state_dict)`, of a hub repository also `log_sparsity`, None."""
        if path is None and repo_id is not None:
            source: Source = HubRepository(repo_id, force_download=force_download)
            cfg, state = self._convert(source, folder_name, device, cfg_overrides)
            return cfg, state, None
        if path is None:
            raise TypeError("A converter needs a path, or a repo_id and a folder_name.")
        # From the folder above, because some formats keep part of their settings there. A link is not
        # followed: in a hub cache it is to a file whose name says nothing.
        absolute = Path(os.path.abspath(Path(path).expanduser()))
        source = Folder(absolute.parent, named=absolute)
        return self._convert(source, absolute.name, device, cfg_overrides)

    def _convert(
        self, source: Source, item: str, device: str | None, overrides: dict[str, Any] | None
    ) -> tuple[dict[str, Any], StateDict]:
        coder = load(source, item, self.format, self.given)
        overrides = dict(overrides or {})
        dtype = overrides.pop("dtype", None)
        device = overrides.pop("device", None) or device or "cpu"
        dtype = dtype if isinstance(dtype, str | None) else DTYPE_TO_STR[dtype]
        cfg, state = to_saelens(coder, str(device), dtype)
        for name, value in overrides.items():
            (cfg if name in cfg else cfg["metadata"])[name] = value
        return cfg, {name: tensor.to(device) for name, tensor in state.items()}


def converter(
    format: str,
    *,
    widths: Sequence[int] | None = None,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
    threshold: float | None = None,
) -> Converter:
    """What `SAE.from_pretrained(repo_id, id, converter=...)` and `SAE.load_from_disk` take.

    Args:
        format: One of `FORMATS`.
        widths: Cumulative widths or group sizes of the nested levels, where the files do not tell them.
        hook_name: Hook of the source, where the files do not tell it.
        hook_name_out: Hook of the target, where the files do not tell it.
        model_name: The language model, where the files do not tell it.
        threshold: A threshold for every latent, in place of the k of a TopK coder.

    Raises:
        FormatError: there is no such format.
    """
    get_format(format)
    return Converter(format, Unstated(widths, hook_name, hook_name_out, model_name, threshold))


def load(source: Source, item: str, format: str, given: Unstated | None = None) -> SparseCoder:
    """Read one model, with what the user knows of it.

    Raises:
        FormatError: it is not what its format says, or its hook is unknown.
    """
    label = f"{source.label}/{item}"
    coder = get_format(format).load(source, item)
    return (given or Unstated()).applied(coder, _layer(item), label)


def _layer(item: str) -> int | None:
    found = re.findall(r"(?:layer|layers|blocks|h)[_.-]?(\d+)", item)
    return int(found[-1]) if found else None
