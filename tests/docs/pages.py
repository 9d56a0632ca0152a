"""What the guides show: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(r"(saelens-matryoshka|torchrun .*?-m saelens_matryoshka) +")


class Command(NamedTuple):
    """A call of the command line that a page shows."""

    page: str
    line: str
    arguments: list[str]


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[Command]:
    """The calls of our command line, in bash blocks and in code within the text.

    Code within the text is a call only if it has arguments and is not cut with an ellipsis.
    """
    lines = [line for block in code_blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines += [code for code in inline if "…" not in code and "..." not in code and len(code.split()) > 2]
    found = []
    for line in lines:
        if program := PROGRAM.match(line):
            arguments = shlex.split(line[program.end() :], comments=True)
            found.append(Command(page.relative_to(ROOT).as_posix(), line, arguments))
    return found
