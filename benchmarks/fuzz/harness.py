"""One input: bytes decide which valid files are written and what is done to them; then they are imported."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fuzz.choices import Choices
from benchmarks.fuzz.corruptions import corrupt
from benchmarks.fuzz.seeds import ITEM, SEEDS
from saelens_matryoshka.formats import FormatError
from saelens_matryoshka.formats.export import export_models, import_models
from saelens_matryoshka.formats.registry import Unstated

MAX_SECONDS = 5
MAX_BYTES = 256 << 20
"""resident memory that one input may take; its files have some kilobytes"""
MAX_MESSAGE = 2000
MAX_WARNINGS = 3


class Broken(Exception):
    """An importer broke a promise."""


class Outcome(NamedTuple):
    """What became of one input."""

    format: str
    """the format it pretended to be"""
    refusal: str | None
    """the error's message; None: it was imported"""


def try_input(data: bytes, folder: Path) -> Outcome:
    """Write hostile files, import them, and check what is promised of every import.

    Promised: success, or a ValueError (of an import a FormatError) with a short, printable message; in
    `MAX_SECONDS`, with `MAX_BYTES`; and no file that was not there before, unless it succeeds.

    Args:
        data: Decides everything.
        folder: Where to work; it is emptied.

    Raises:
        Broken: a promise is broken.
    """
    shutil.rmtree(folder, ignore_errors=True)
    choices = Choices(data)
    format, place, out = _written(choices, folder), folder / ITEM, folder / "out"
    before = _tree(folder)
    refusal = None
    _forget_peak()
    resident, started = _memory("VmRSS"), time.monotonic()
    with warnings.catch_warnings(record=True) as warned, _stopped_after(MAX_SECONDS):
        warnings.simplefilter("always")
        try:
            _import(choices, format, place, out)
        except Broken:
            raise
        except ValueError as error:
            refusal = str(error)
            _check_message(error)
        except Exception as error:
            raise Broken(f"{type(error).__name__} in {_place_of(error)}: {str(error)[:200]}") from error
    seconds, peak = time.monotonic() - started, _memory("VmHWM") - resident
    if seconds > MAX_SECONDS:
        raise Broken(f"{format}: took {seconds:.1f} s")
    if peak > MAX_BYTES:
        raise Broken(f"{format}: took {peak >> 20} MB of memory")
    if len(warned) > MAX_WARNINGS:
        raise Broken(f"{format}: {len(warned)} warnings, first: {warned[0].message}")
    new = sorted(_tree(folder) - before)
    if refusal is not None and new:
        raise Broken(f"{format}: refused, and left {new[0]}")
    if refusal is None and not out.is_dir():
        raise Broken(f"{format}: imported nothing and said nothing")
    return Outcome(format, refusal)


def _written(choices: Choices, folder: Path) -> str:
    """Write hostile files; the format to say they are of."""
    format, write = choices.pick(SEEDS)
    place = folder / ITEM
    place.mkdir(parents=True)
    write(place)
    for _ in range(choices.integer(0, 3)):
        files = sorted(path for path in place.rglob("*") if path.is_file())
        if files:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                corrupt(choices.pick(files), choices)
    return choices.pick(SEEDS)[0] if choices.chance(20) else format


def _import(choices: Choices, format: str, place: Path, out: Path) -> None:
    if format == "saelens" and choices.chance(2):
        to = choices.pick(("circuit-tracer", "saelens", "sparsify", "dictionary-learning"))
        widths = choices.pick(((), (2,), (2, 8), (8,), (0,), (99,)))
        export_models(place, to, out, widths=widths, topk=choices.pick((None, 3)))
        return
    given = Unstated(hook_name="blocks.{layer}.x") if choices.chance(2) else None
    try:
        import_models(str(place), format, out, given=given)
    except ValueError as error:
        if not isinstance(error, FormatError):  # which is what it is documented to raise
            raise Broken(f"{type(error).__name__} in {_place_of(error)}: {str(error)[:200]}") from error
        raise


def _check_message(error: BaseException) -> None:
    text = str(error)
    where = _place_of(error)
    if not text.strip():
        raise Broken(f"no message in {where}") from error
    if len(text) > MAX_MESSAGE:
        raise Broken(f"message of {len(text)} characters in {where}: {text[:80]}...") from error
    if any(not (character.isprintable() or character == "\n") for character in text):
        raise Broken(f"message with control characters in {where}: {ascii(text)[:200]}") from error
    if re.search(r"object at 0x|Traceback", text):
        raise Broken(f"message of a programmer in {where}: {text[:200]}") from error


def _place_of(error: BaseException) -> str:
    """The innermost line of this package that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/saelens_matryoshka/" in frame.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Generator[None, None, None]:
    """Interrupts Python code that runs on; libFuzzer's own -timeout stops what does not come back to it."""

    def stop(*_: Any) -> None:
        raise Broken(f"still at it after {seconds} s: {''.join(traceback.format_stack(limit=6))}")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes, 0 where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) << 10 if match else 0
