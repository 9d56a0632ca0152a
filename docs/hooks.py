"""Pages that MkDocs makes as it builds, so that they cannot be out of date.

- `reference/cli.md`: the command line, from the commands themselves.
- `RESULTS.md`: the benchmarks' tables, which live beside the benchmarks.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
import textwrap
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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the results, which read on GitHub as they are, lead to the page of the site."""
    return markdown.replace("](../benchmarks/RESULTS.md", "](RESULTS.md")


def command_line_page() -> str:
    """What typer says of the commands, with their examples as code."""
    typer = f"-W ignore -m typer saelens_matryoshka.cli utils docs --name {PROGRAM}"
    command = [sys.executable, *typer.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = html.unescape(done.stdout)
    text = text.replace(f"# `{PROGRAM}`", "# Command line", 1).replace(f"## `{PROGRAM} ", "## `")
    # In the list of commands typer cuts their summaries.
    summaries = dict(re.findall(r"^## `(\w+)`\n\n(.+(?:\n.+)*)", text, flags=re.MULTILINE))
    in_list = re.compile(r"^\* `(\w+)`: .*", flags=re.MULTILINE)
    text = in_list.sub(lambda found: f"* [`{found[1]}`](#{found[1]}): {summaries[found[1]]}", text)
    # A docstring's examples are lines that begin with a program's name; what is indented more goes on.
    example = rf"(?:^( *)(?:{PROGRAM}|torchrun) .*\n(?:\1 +\S.*\n)*)+"
    return re.sub(example, _as_code, text, flags=re.MULTILINE)


def _as_code(found: re.Match[str]) -> str:
    return f"\n```bash\n{textwrap.dedent(found.group())}```\n"


def results_page() -> str:
    """benchmarks/RESULTS.md as it is, its wide tables in place of the navigation beside them."""
    return "---\nhide: [navigation]\n---\n" + (ROOT / "benchmarks" / "RESULTS.md").read_text()
