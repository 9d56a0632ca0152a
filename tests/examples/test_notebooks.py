"""The notebooks run, on the tiny embedded model, and are committed clean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
MODEL = 'MODEL = "gemma-2-2b"'
SHORTER = {
    "200_000": "20_480",
    "n_prompts: int = 64": "n_prompts: int = 16",
    "n_tokens=20_000": "n_tokens=4_000",
}
SHORTER["n_ce_tokens=4_000"] = "n_ce_tokens=1_000"

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: make setup")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count or cell.metadata for cell in code)
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}
    # a reader is told before every cell, but for the first, what it shows
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_on_the_tiny_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    root = str(EXAMPLES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith(MODEL)
    first.source = first.source.replace(MODEL, 'MODEL = "tiny"')
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    printed += "".join(shown.get("text/plain", "") for shown in data)
    pages = "".join(shown.get("text/html", "") for shown in data)
    assert "CE rec." in printed
    assert "JumpReLUTranscoder of 256 latents" in printed
    assert pages.count("<h4>Latents") == 4
    assert pages.count("promotes") >= 6
