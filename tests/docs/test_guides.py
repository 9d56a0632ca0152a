"""The Python that the guides show runs as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, code_blocks


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart.md", "concepts.md", "training.md"])
def test_the_python_of_a_guide_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(code_blocks(ROOT / "docs" / page, "python"))
    code = code.replace("training_tokens=100_000", "training_tokens=20_480").replace(
        "n_tokens=20_000", "n_tokens=4_000"
    )
    exec(compile(code, page, "exec"), {"__name__": page})
    printed = capsys.readouterr().out
    # What a block says in a comment after a print is what it prints.
    said = re.findall(r"^print\(.*\)  # (\[\d.*|blocks\..*)$", code, flags=re.MULTILINE)
    assert said
    assert all(line in printed for line in said)
