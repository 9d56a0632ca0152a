"""What CONTRIBUTING.md says of the repository is so."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGE = ROOT / "saelens_matryoshka"


def test_every_package_is_in_the_table() -> None:
    named = set(re.findall(r"`(\w+)/`", PAGE.partition("## What holds everywhere")[0]))
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert packages <= named


def test_every_path_is_there() -> None:
    paths = re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+|\.ci/run)`", PAGE)
    assert len(paths) > 20
    assert not [path for path in paths if not ((ROOT / path).exists() or any(PACKAGE.rglob(path)))]
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not (ROOT / link).exists()]


def test_every_target_of_make_is_one() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", PAGE, flags=re.MULTILINE)
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)
