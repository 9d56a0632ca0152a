"""Pages that MkDocs makes as it builds, so that they cannot be out of date.

- `reference/cli.md`: the command line, from the commands themselves.
- `RESULTS.md`: the benchmarks' tables, which live beside the benchmarks.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PROGRAM = "saelens-matryoshka"


def on_files(files: Files, config: Any) -> Files:
    """MkDocs calls this when it has collected the pages."""
    files.append(File.generated(config, "reference/cli.md", content=command_line_page()))
    files.append(File.generated(config, "RESULTS.md", content=results_page()))
    files.append(
        File.generated(config, "quality.png", content=(ROOT / "benchmarks" / "quality.png").read_bytes())
    )
    return files


def command_line_page() -> str:
    """What typer says of the commands, with their examples as code."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "typer",
            "saelens_matryoshka.cli",
            "utils",
            "docs",
            "--name",
            PROGRAM,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    text = html.unescape(done.stdout)
    text = text.replace(f"# `{PROGRAM}`", "# Command line", 1).replace(f"## `{PROGRAM} ", "## `")
    # A docstring's examples are lines that begin with the program's name, and may be continued after a \.
    example = rf"(?:^ *{PROGRAM} .*(?:\\\n.*)*\n)+"
    return re.sub(example, _as_code, text, flags=re.MULTILINE)


def _as_code(found: re.Match[str]) -> str:
    lines = [line.strip() for line in found.group().splitlines()]
    return "\n```bash\n" + "\n".join(lines) + "\n```\n"


def results_page() -> str:
    """benchmarks/RESULTS.md as it is."""
    return (ROOT / "benchmarks" / "RESULTS.md").read_text()
