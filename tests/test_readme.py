"""What the README shows runs as it is. (The examples: tests/examples.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    done = _run("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[64, 256, 512, 1024]" in done.stdout
    assert "torch.Size([4, 1, " in done.stdout
    assert '"ce_recovered"' in done.stdout
