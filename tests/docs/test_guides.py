"""The Python that the README and the guides show runs as it is. (The examples: tests/examples.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, code_blocks
from tests.forked import run_function


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "prints"),
    [
        (["README.md", "docs/quickstart.md"], ["torch.Size([4, 1, ", '"ce_recovered"']),
        (["docs/concepts.md"], []),
        (["docs/training.md"], []),
    ],
    ids=["README.md and quickstart.md", "concepts.md", "training.md"],
)
def test_the_python_of_a_guide_runs(pages: list[str], prints: list[str], tmp_path: Path) -> None:
    blocks = [block for page in pages for block in code_blocks(ROOT / page, "python")]
    code = "\n".join(dict.fromkeys(blocks))  # what both pages show is run once
    done = run_function(exec, code, {"__name__": "__main__"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # What a block says in a comment after a print is what it prints.
    said = re.findall(r"^print\(.*\)  # (\[\d.*|blocks\..*)$", code, flags=re.MULTILINE)
    assert said
    assert all(line in done.stdout for line in [*said, *prints])


def test_the_quick_start_trains_as_the_readme_does() -> None:
    first, _ = code_blocks(ROOT / "README.md", "python")
    assert code_blocks(ROOT / "docs" / "quickstart.md", "python")[0] == first
