"""A row of the tables of bad input, and what every row is checked for."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from saelens_matryoshka.cli import main

MAX_MESSAGE = 600
"""characters: some errors list what there is to choose from"""


class Case(NamedTuple):
    """Something a user may do, and what they are told."""

    entry: str
    """the command, class or function"""
    given: Any
    """a command's arguments in shell syntax; a Python entry's own"""
    says: str
    """regular expression that the error matches: the field, the value and what to do"""
    code: int = 1
    """a command's exit code: 2 if the arguments themselves are wrong, 1 for what they lead to"""


def name_of(case: Case) -> str:
    """The test's id."""
    given = case.given if isinstance(case.given, str) else repr(case.given)
    return re.sub(r"[^\w.=-]+", "_", f"{case.entry} {given}")[:90]


def rows(cases: list[Case]) -> Any:
    """Parametrises a test with a table."""
    return pytest.mark.parametrize("case", cases, ids=[name_of(case) for case in cases])


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    stats = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def check_command(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run a command in a folder: one error that says what the case says, and nothing written or lost."""
    before = snapshot(place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", case.entry, *shlex.split(case.given)])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as stopped:
            main()
    said = capfd.readouterr()
    assert stopped.value.code == case.code, said.out + said.err
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", said.err).split())
    _check_message(message, case.says)
    assert message.count("rror") <= 2 + case.says.count("rror"), f"more than one error: {message}"
    assert not said.out.strip(), f"a result, and an error: {said.out}"
    told = [str(warning.message) for warning in warned if _for_users(warning)]
    assert not told, f"warnings beside the error: {told}"
    assert snapshot(place) == before, "something was written or lost"


def check_call(case: Case, call: Callable[[], Any], place: Path | None = None) -> None:
    """Call something: one ValueError (or OSError) that says what the case says, and nothing written."""
    before = snapshot(place) if place else {}
    with pytest.raises((ValueError, OSError)) as raised:
        call()
    _check_message(" ".join(str(raised.value).split()), case.says)
    assert (snapshot(place) if place else {}) == before, "something was written or lost"


def _check_message(message: str, says: str) -> None:
    assert re.search(says, message), f"{message!r} does not say {says!r}"
    assert len(message) < MAX_MESSAGE, f"{len(message)} characters"
    for slip in ("Traceback", "object at 0x", "Errno", "NoneType"):
        assert slip not in message, message


def _for_users(warning: warnings.WarningMessage) -> bool:
    return not issubclass(warning.category, DeprecationWarning | ResourceWarning | PendingDeprecationWarning)
