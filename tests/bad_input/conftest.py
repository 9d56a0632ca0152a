"""A folder with good and bad models and texts, made once; every case leaves it as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer

from saelens_matryoshka import tiny
from saelens_matryoshka.formats import SparseCoder, build

_WEIGHTS = "sae_weights.safetensors"


@pytest.fixture(autouse=True)
def _one_language_model(tiny_model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands load the embedded model; here they all get the same."""
    monkeypatch.setattr(tiny, "load_hooked_transformer", lambda: tiny_model)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder."""
    root = tmp_path_factory.mktemp("bad-input")
    build(coder()).save_model(root / "sae")
    build(coder(k=8)).save_model(root / "topk")
    build(coder(d=16)).save_model(root / "narrow")
    build(coder(transcoder=True)).save_model(root / "transcoder")
    for layer in (0, 2):
        build(coder(transcoder=True, layer=layer)).save_model(root / "gap" / f"layer_{layer}")
    for name, change in BROKEN.items():
        shutil.copytree(root / "sae", root / name)
        change(root / name)
    for name, content in TEXTS.items():
        (root / name).write_bytes(content)
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "kept").write_text("x")
    yield root
    assert (root / "full" / "kept").read_text() == "x"


def coder(*, layer: int = 0, k: int | None = None, transcoder: bool = False, d: int = 128) -> SparseCoder:
    """64 random latents of the embedded model's residual stream, or of an MLP."""
    generator = torch.Generator().manual_seed(layer)
    hooks = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    if transcoder:
        hooks = {"hook_name": f"blocks.{layer}.ln2.hook_normalized", "input_frame": "normalized"}
        hooks["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    metadata = {"model_name": "tiny", "context_size": 32, "matryoshka_widths": [16, 64]}
    return SparseCoder(
        W_enc=torch.randn(d, 64, generator=generator) / d**0.5,
        b_enc=torch.zeros(64),
        W_dec=torch.randn(64, d, generator=generator) / 8,
        b_dec=torch.zeros(d),
        threshold=torch.ones(64) if k is None else None,
        k=k,
        metadata={**metadata, **hooks},
    )


def _cfg(**changes: Any) -> Callable[[Path], None]:
    """Change fields of cfg.json; None removes one."""

    def change(folder: Path) -> None:
        cfg = {**json.loads((folder / "cfg.json").read_text()), **changes}
        kept = {name: value for name, value in cfg.items() if name not in changes or value is not None}
        (folder / "cfg.json").write_text(json.dumps(kept))

    return change


def _metadata(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        _cfg(metadata={**metadata, **changes})(folder)

    return change


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / _WEIGHTS)
        change(tensors)
        save_file(tensors, folder / _WEIGHTS)

    return rewrite


def _folder_of_that_name(folder: Path) -> None:
    (folder / _WEIGHTS).unlink()
    (folder / _WEIGHTS).mkdir()


BROKEN: dict[str, Callable[[Path], None]] = {
    "cfg-absent": lambda folder: (folder / "cfg.json").unlink(),
    "cfg-empty": _write("cfg.json", b""),
    "cfg-cut": _write("cfg.json", b'{"architecture": "jumpre'),
    "cfg-list": _write("cfg.json", b"[]"),
    "cfg-latin-1": _write("cfg.json", b'{"a": "\xe9"}'),
    "cfg-huge": _write("cfg.json", b'{"a": "' + b"x" * (5 << 20) + b'"}'),
    "cfg-deep": _write("cfg.json", b"[" * 100_000),
    "architecture-absent": _cfg(architecture=None),
    "architecture-unknown": _cfg(architecture="sideways"),
    "architecture-number": _cfg(architecture=3),
    "architecture-other": _cfg(architecture="gated"),
    "d_sae-absent": _cfg(d_sae=None),
    "d_sae-text": _cfg(d_sae="64"),
    "d_sae-other": _cfg(d_sae=65),
    "d_sae-endless": _cfg(d_sae=1 << 40),
    "d_in-other": _cfg(d_in=64),
    "d_in-negative": _cfg(d_in=-128),
    "dtype-unknown": _cfg(dtype="float12"),
    "normalize-unknown": _cfg(normalize_activations="sideways"),
    "metadata-number": _cfg(metadata=3),
    "widths-misfit": _metadata(matryoshka_widths=[3, 7]),
    "widths-text": _metadata(matryoshka_widths="16,64"),
    "hook-absent": _metadata(hook_name=None),
    "hook-unknown": _metadata(hook_name="blocks.99.hook_resid_post"),
    "hook-number": _metadata(hook_name=7),
    "model-absent": _metadata(model_name=None),
    "model-unknown": _metadata(model_name="gpt-9"),
    "context-text": _metadata(context_size="many"),
    "context-negative": _metadata(context_size=-3),
    "context-long": _metadata(context_size=10**9),
    "frame-other": _metadata(input_frame="sideways"),
    "kwargs-number": _metadata(model_from_pretrained_kwargs=3),
    "details-text": _metadata(training_architecture_details="k=8"),
    "weights-absent": lambda folder: (folder / _WEIGHTS).unlink(),
    "weights-empty": _write(_WEIGHTS, b""),
    "weights-cut": lambda folder: _write(_WEIGHTS, (folder / _WEIGHTS).read_bytes()[:5000])(folder),
    "weights-pickle": _write(_WEIGHTS, b"\x80\x04cos\nmkdir\n(S'harm'\ntR."),
    "weights-folder": _folder_of_that_name,
    "weights-nan": _tensors(lambda tensors: tensors["W_enc"][0].fill_(float("nan"))),
    "weights-infinite": _tensors(lambda tensors: tensors["b_dec"].fill_(float("inf"))),
    "weights-lack-one": _tensors(lambda tensors: tensors.pop("W_dec")),
    "weights-transposed": _tensors(
        lambda tensors: tensors.update(W_dec=tensors["W_dec"].T.contiguous()),
    ),
}
"""Copies of `sae`, each with one thing wrong."""

TEXTS = {
    "good.txt": b"def f(x):\n    return x\n" * 200,
    "empty.txt": b"",
    "empty.jsonl": b"",
    "empty.parquet": b"",
    "cut.jsonl": b'{"text": "def',
    "no-text.jsonl": b'{"code": "def f(): pass"}\n' * 5,
    "numbers.jsonl": b'{"text": 1}\n' * 5,
    "nulls.jsonl": b'{"text": null}\n' * 5,
    "lists.jsonl": b'{"text": ["a"]}\n' * 5,
    "short.jsonl": b'{"text": "x"}\n',
    "foreign.jsonl": b'{"input_ids": [1, 2, 99999999, 4, 5, 6, 7, 8]}\n' * 50,
    "negative.jsonl": b'{"input_ids": [1, 2, -4, 4, 5, 6, 7, 8]}\n' * 50,
    "no-text.csv": b"a,b\n1,2\n",
    "binary.txt": bytes(range(256)) * 20,
    "binary.parquet": b"PAR1 nothing PAR1",
    "good.text": b"a text by another suffix",
    "file": b"x",
}
"""Texts, most of which cannot be read."""
