"""What the six evals run on for the embedded model, which knows little but Python: no download, minutes.

The labelled text is made from the standard library's sources, and there is less of all text. (Absorption
finds that the model does not know the first letters of its tokens.)
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from saelens_matryoshka.saebench.data import LabelledText, Split
from saelens_matryoshka.tiny import text as tiny_text

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "core": {"n_eval_reconstruction_batches": 5, "n_eval_sparsity_variance_batches": 10},
    "absorption": {},
    "sparse_probing": {},
    "sae_probes": {"dataset_names": ["159_code_Python"]},
    "scr": {},
    "tpp": {},
}
"""Smaller than SAEBench's own, by eval."""

_TOPICS = ("asyncio", "email", "importlib", "tkinter", "xml")
_LONGEST = 400  # characters


def standard_library() -> LabelledText:
    """Labelled text for the embedded model, from the Python standard library's sources.

    The label is the package a piece of text is from, the attribute whether it is prose (a docstring) or
    code (a function without it). One piece in four is in the test split.
    """
    rows: dict[Split, list[dict[str, str]]] = {"train": [], "test": []}
    known: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(tiny_text.stdlib_files("train") + tiny_text.stdlib_files("held_out")):
        topic = path.relative_to(root).parts[0]
        if topic not in _TOPICS:
            continue
        for attribute, piece in _pieces(path):
            if piece in known:
                continue
            known.add(piece)
            split: Split = "test" if hashlib.sha256(piece.encode()).digest()[0] % 4 == 0 else "train"
            rows[split].append({"text": piece, "label": topic, "attribute": attribute})
    return LabelledText(Dataset.from_list(rows["train"]), Dataset.from_list(rows["test"]))


def _pieces(path: Path) -> Iterator[tuple[str, str]]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) > 40:
            yield "prose", docstring[:_LONGEST]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1:][:1] if docstring else node.body[:1]
            if first and node.end_lineno is not None:
                code = "\n".join(lines[first[0].lineno - 1 : node.end_lineno])
                if len(code) > 40:
                    yield "code", code[:_LONGEST]
