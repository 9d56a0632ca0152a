"""Which part of the package imports which: always one way, imports inside functions included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (
            ["/venv/bin/saelens-matryoshka", "train"],
            ["python", "/venv/bin/saelens-matryoshka", "train"],
            True,
        ),
        (["saelens-matryoshka.exe"], ["python", "saelens-matryoshka.exe"], True),
        (["-m", "train"], ["python", "-u", "-m", "saelens_matryoshka", "train"], True),
        (["-m", "saelens_matryoshka"], ["python", "-m", "other", "saelens_matryoshka"], False),
        (["-m"], ["python", "-m", "saelens_matryoshka.tiny.train"], False),
        (["-m"], ["python", "-um", "saelens_matryoshka"], False),
        (["-c"], ["python", "-c", "import saelens_matryoshka"], False),
        (["/venv/bin/saelens-matryoshka"], ["python", "-c", "from multiprocessing.spawn import …"], False),
        (["train.py", "-m", "saelens_matryoshka"], ["python", "train.py", "-m", "saelens_matryoshka"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_command_line_defers_the_imports(
    argv: list[str], orig_argv: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert saelens_matryoshka._is_command_line() == expected
