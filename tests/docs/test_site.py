"""The site builds without network, and no link in it is broken."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saelens_matryoshka as sm
from tests.docs.pages import ROOT

pytest.importorskip("mkdocs", reason="the docs' tools are not installed: make setup")
pytest.importorskip("mkdocstrings", reason="the docs' tools are not installed: make setup")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"  # so that whatever reaches for the network fails
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:[^\" >]+)", page.read_text()
        )
        assert not [url for url in loaded if "canonical" not in url], page.name


@pytest.mark.slow
def test_the_reference_has_every_command_and_every_public_name(site: Path) -> None:
    import typer.main

    from saelens_matryoshka.cli import app

    commands = (site / "reference" / "cli.html").read_text()
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f'<h2 id="{name}">' in commands
    assert "Train a Matryoshka SAE or transcoder in a folder of its own" in commands[: commands.index("<h2")]
    names = (site / "reference" / "python.html").read_text()
    for name in sm.__all__:
        assert f'id="saelens_matryoshka.{name}' in names, name
    signature = re.sub(r"<[^>]+>|\s", "", names)
    assert "MatryoshkaTrainingSAEConfig(d_in," in signature, "without the fields it inherits from SAELens"


@pytest.mark.slow
def test_the_reference_is_laid_out_as_it_was_written(site: Path) -> None:
    pages = [(site / "reference" / f"{name}.html").read_text() for name in ("cli", "python")]
    commands, names = (html.unescape(re.sub(r"<[^>]+>", "", page)) for page in pages)
    # every example in a block of its own, one call a line
    assert "\ntorchrun --nproc-per-node 8 -m saelens_matryoshka train --preset gpt2\n" in commands
    # what is returned is one thing, though two lines say what
    assert "sae.decode(feature_acts).\nLike decode, it is without the skip" in names
