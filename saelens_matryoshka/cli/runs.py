"""`saelens-matryoshka runs`: the training runs of a folder, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saelens_matryoshka.cli.output import Console, Json, on_stdout, require_writable, write_numbers
from saelens_matryoshka.files.valid_json import dumps


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("runs")(runs)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where runs are kept.")] = Path("results"),
    prefixes: Annotated[bool, typer.Option("--prefixes", help="A row for every prefix.")] = False,
    json: Json = None,
) -> None:
    """List runs side by side: FVU, L0, dead latents, CE recovered.

    The numbers are those of metrics.json, measured on held-out text after
    training; of a run that is not done, those of its last logged batch, with a ~.
    CE recovered is that against zero ablation.

      saelens-matryoshka runs
      saelens-matryoshka runs results/gpt2 --prefixes
    """
    from saelens_matryoshka.runs.catalogue import find_runs, runs_table

    require_writable(json)
    found = find_runs(folder)
    if not on_stdout(json):
        console = Console()
        if found:
            console.print(runs_table(found, prefixes=prefixes))
        else:
            console.print(f"There are no runs in {folder}.", markup=False)
    write_numbers(dumps([run.to_dict() for run in found], indent=2), json)
