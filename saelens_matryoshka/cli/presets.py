"""`saelens-matryoshka presets`: settings that go with a model, by name."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box

from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.files.valid_json import dumps


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("presets")(presets)


def presets(
    name: Annotated[str | None, typer.Argument(help="Show one of them.")] = None,
    json: Json = None,
) -> None:
    """List the presets of `train`, or show one.

    saelens-matryoshka presets
    saelens-matryoshka presets gemma-2-2b-layer-8
    """
    from rich.table import Table

    from saelens_matryoshka.runs.presets import load_preset, preset_names

    require_writable(json)
    quieten()
    console = Console()
    found = [load_preset(one) for one in ([name] if name else preset_names())]
    write_numbers(dumps([preset.to_dict() for preset in found], indent=2), json)
    if on_stdout(json):
        return
    if name:
        console.print(f"[bold]{name}[/]: {found[0].description}")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_header=False)
        for key, given in found[0].settings.items():
            table.add_row(key, str(given.value))
        console.print(table)
        console.print(f"`saelens-matryoshka train --preset {name} --dry-run` shows what it resolves to.")
        return
    # narrow, so that names need a second line only on less than 80 columns
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("preset", overflow="fold")
    table.add_column("model", overflow="fold")
    for heading in ("layer", "latents", "k", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for preset in found:
        values = preset.to_dict()
        table.add_row(
            preset.name,
            values["model_name"],
            str(values["layer"]),
            f"{values['d_sae']:,}",
            f"{values['k']:g}",
            f"{values['training_tokens'] / 1e6:g}M",
        )
    console.print(table)
