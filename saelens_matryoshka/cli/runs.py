"""`saelens-matryoshka runs`: the training runs of a folder, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("runs")(runs)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where runs are kept.")] = Path("results"),
    prefixes: Annotated[bool, typer.Option("--prefixes", help="A row for every prefix.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs of `train`, and compare them: FVU, L0, dead latents, CE recovered.

    The numbers are those of metrics.json, measured on held-out text after
    training; of a run that is not done, those of its last logged batch, with a ~.

      saelens-matryoshka runs
      saelens-matryoshka runs results/gpt2 --prefixes
    """
    from saelens_matryoshka.runs.catalogue import find_runs, runs_table

    found = find_runs(folder)
    if as_json:
        print(json.dumps([run.to_dict() for run in found], indent=2))
        return
    console = Console(highlight=False)
    if not found:
        console.print(f"There are no runs in {folder}.", markup=False)
        return
    console.print(runs_table(found, prefixes=prefixes))
