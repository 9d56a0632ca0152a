"""What the commands print and write."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import IO, Annotated, Any

import rich.console
import typer
from rich.cells import cell_len
from rich.console import Group
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from saelens_matryoshka.files.atomic import obstacle, write_atomically

OUTPUT, TEXT = "Output", "Text and tokens"
"""panels of the help: what is printed and written, and what is measured on"""
_UNLIMITED = 1000
"""columns of a terminal that every table fits in"""
_FOLDED = 8
"""columns that text which may be folded is given, however narrow the terminal is"""


class _Aside:
    """Standard error, in the place of a standard output that is kept for the result."""

    def __init__(self, kept: IO[str]) -> None:
        self.kept = kept

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _alone_on_stdout(context: typer.Context, json: Path | None) -> Path | None:
    """Have what libraries print, about a model they load or move, stay out of JSON on standard output."""
    if on_stdout(json):
        aside: Any = _Aside(sys.stdout)
        context.with_resource(redirect_stdout(aside))
    return json


Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=_alone_on_stdout,
        metavar="[FILE.json]",
        help="Print the result as JSON, and nothing else; with a file, write it there beside the table.",
        rich_help_panel=OUTPUT,
    ),
]


class Console(rich.console.Console):
    """The terminal, where what is wider than a line is left to it to wrap: no figure of a table is cut, and a
    word, a path mostly, stays whole and can be copied.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, highlight=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, but for lines with such a word or table."""
        words = (word for one in objects if isinstance(one, str | Text) for word in str(one).split())
        if any(cell_len(word) > self.width for word in words):
            options["soft_wrap"] = True
        for one in objects:
            if isinstance(one, Group):
                for part in one.renderables:
                    self.print(part, **options)
                return
        width = self.width
        needed = max((self._needed(one) for one in objects if isinstance(one, Table)), default=0)
        if needed > width:
            self.width = needed
        super().print(*objects, **options)
        if needed > width:
            self.width = width

    def _needed(self, table: Table) -> int:
        """Columns below which rich would cut what a table says."""
        folded = [column for column in table.columns if not column.no_wrap]
        for column in folded:
            column.width = column.min_width or _FOLDED
        try:
            return self.measure(table, options=self.options.update(width=_UNLIMITED)).maximum
        finally:
            for column in folded:
                column.width = None

    def tell(self, error: str) -> None:
        """Print an error, in lines that end between words."""
        text = Text("\n".join(_filled(line, self.width) for line in f"error: {error}".splitlines()))
        text.stylize("bold red", 0, len("error:"))
        self.print(text, soft_wrap=True)


def _filled(line: str, width: int) -> str:
    """A line as several; one that is indented, a command, as it is."""
    if line.startswith(" "):
        return line
    return fill(line, width, break_long_words=False, break_on_hyphens=False)


def with_json_targets(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a lone `--json` is `--json -`, for an option whose value may be left out.

    What follows it is its value only if it is "-" or ends in .json: `runs --json results` lists `results`.
    """
    given = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        given.append(argument)
        if argument == "--json" and following != "-" and not following.endswith(".json"):
            given.append("-")
    return given


def paragraphs(docstring: str) -> str:
    """A docstring as help: each paragraph one line, as wide as the terminal; commands as they are."""
    return "\n\n".join(
        part if "saelens-matryoshka " in part else " ".join(part.split()) for part in docstring.split("\n\n")
    )


def on_stdout(json: Path | None) -> bool:
    """Whether JSON is asked for on standard output, which then has nothing else."""
    return json is not None and str(json) == "-"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s")


@contextmanager
def token_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with rate and time left, moved by what is done, and how many tokens of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            if bar.tasks[0].description != what:
                # what was done before, of work that goes on, does not count for the rate
                bar.reset(task, total=total, completed=done, description=what)
            bar.update(task, completed=min(done, total))

        yield update


def write_numbers(numbers: str, json: Path | None) -> None:
    """Print or write what `--json` asks for, if it does."""
    if json is None:
        return
    if on_stdout(json):
        print(numbers, file=getattr(sys.stdout, "kept", sys.stdout))
        return
    write_atomically(json, numbers + "\n")
    Console().print(f"written: {json}", markup=False)


def write_result(shown: rich.console.RenderableType, numbers: str, described: str, json: Path | None) -> None:
    """Print a result, with the text it was measured on, and write its numbers if asked to."""
    if not on_stdout(json):
        console = Console()
        console.print(shown)
        console.print(f"text: {described}", markup=False)
    write_numbers(numbers, json)


def require_writable(file: Path | None, option: str = "--json") -> None:
    """Check, before any work, that what an option names can be written at its end.

    Raises:
        ValueError: the path is a folder or a device, or below a file, or not writable.
    """
    if file is None or (option == "--json" and on_stdout(file)):
        return
    if file.is_dir():
        raise ValueError(f"{option} {str(file)!r} is a folder: name a file.")
    if file.exists() and not file.is_file():  # whose place would be taken
        raise ValueError(f"{option} {str(file)!r} is a device or a pipe: name a file.")
    if fault := obstacle(file):
        raise ValueError(f"{option} {str(file)!r} cannot be written: {fault}.")


def quieten() -> None:
    """Hide notices that tell the user of a command nothing."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for message in (
        "Dataset is not tokenized",
        "The training dataset contains fewer samples",
        "All samples in the training dataset have been exhausted",
        r"\nThis SAE has non-empty model_from_pretrained_kwargs",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it shows its own warnings, once
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it then raises


def message(error: BaseException) -> str:
    """What to say of an error."""
    if "couldn't connect to 'https://huggingface.co'" in str(error):
        return (
            "the Hugging Face hub cannot be reached, and the model is not in this machine's cache (HF_HOME, "
            "else ~/.cache/huggingface). Try again online, or copy the cache from a machine that has it. "
            "`--preset tiny` needs no network."
        )
    if found := re.match("Couldn't reach ('.*') on the Hub", str(error)):
        return (
            f"dataset {found[1]} is no folder here, and the Hugging Face hub cannot be reached to look for "
            "it. A text file's name must end in .txt, .jsonl, .parquet or .csv."
        )
    return str(error) or type(error).__name__
