"""Which part of the package imports which: always one way, imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import saelens_matryoshka

PACKAGE = Path(saelens_matryoshka.__file__).parent


def _imported(file: Path) -> Iterator[str]:
    """The full names of all that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_two_parts_import_each_other() -> None:
    needs: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).with_suffix("").parts[0]
        ours = (name.split(".")[1] for name in _imported(file) if name.startswith(f"{PACKAGE.name}."))
        needs.setdefault(part, set()).update(name for name in ours if name != part)
    assert {"runs", "layers", "formats"} <= needs.keys()
    TopologicalSorter(needs).prepare()  # raises a CycleError that names the circle
