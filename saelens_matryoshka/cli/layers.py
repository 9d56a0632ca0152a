"""`saelens-matryoshka train --layers`: several runs in lockstep."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape

from saelens_matryoshka.cli.interruption import going_on, told_how_to_go_on
from saelens_matryoshka.cli.output import Console, on_stdout, write_numbers
from saelens_matryoshka.cli.settings import settings_table
from saelens_matryoshka.files.valid_json import dumps

if TYPE_CHECKING:
    from saelens_matryoshka.runs.settings import Settings, SettingsSource


def train_layers(
    sources: Sequence[SettingsSource],
    each: Sequence[SettingsSource],
    *,
    out: Path | None,
    name: str | None,
    recommended: bool,
    dry_run: bool,
    log_every: int,
    upkeep: dict[str, Any],
    json: Path | None,
    console: Console,
) -> None:
    """Train several runs in OUT/MODEL/MAPPINGS/NAME, or say what would be trained."""
    from saelens_matryoshka.runs.folder import run_folder
    from saelens_matryoshka.runs.layers import label_of, resolve_many, train_many
    from saelens_matryoshka.store.reading import hooks_of

    with console.status("resolving the settings"):
        settings = resolve_many(sources, each, recommended=recommended)
        first = next(iter(settings.values()))
        sae = first.cfg.sae
        name = name or f"{sae.d_sae}-k{sae.k:g}-{datetime.now():%Y%m%d-%H%M%S}"
        parent = run_folder(out or Path("results"), first.cfg.model_name, label_of(list(settings)), name).path
    hooks = hooks_of(one.cfg for one in settings.values())
    console.print(
        f"[bold]{'Would train' if dry_run else 'Training'}[/] {len(settings)} dictionaries on "
        f"{escape(first.cfg.model_name)} in lockstep\n"
        f"  {escape(', '.join(settings))}\n"
        f"  {len(hooks)} hooks, {first.cfg.training_tokens:,} tokens\n"
        f"  in {escape(str(parent))}"
    )
    if dry_run:
        _show_plan(settings, parent, console, json)
        return
    from saelens_matryoshka.runs.settings import require_devices
    from saelens_matryoshka.upkeep.keeper import Upkeep

    for one in settings.values():
        require_devices(one.cfg)
    with told_how_to_go_on(parent):
        results = train_many(
            settings, parent, log_every=log_every, upkeep=Upkeep(**upkeep), command=sys.argv[1:]
        )
    _show(results, list(settings), parent, console, json)


def _show_plan(settings: dict[str, Settings], parent: Path, console: Console, json: Path | None) -> None:
    """What each reads and predicts, the settings that are common to all, and what all will take."""
    from saelens_matryoshka.runs.estimate import estimate

    values = {one: given.values() for one, given in settings.items()}
    if not on_stdout(json):
        _show_settings(settings, console)
    with console.status("estimating memory and time"):
        found = estimate(*(one.cfg for one in settings.values()))
    if not on_stdout(json):
        console.print(found.tables())
    plan = {"folder": str(parent), "runs": values, "estimate": found.to_dict()}
    write_numbers(dumps(plan, default=str), json)


def _show_settings(settings: dict[str, Settings], console: Console) -> None:
    from rich.table import Table

    sites = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("run", "reads", "predicts"):
        sites.add_column(heading, overflow="fold")
    for name, one in settings.items():
        sites.add_row(name, one.cfg.hook_name, getattr(one.cfg.sae, "hook_name_out", None) or "the same")
    console.print(sites)
    first, *others = [one.given for one in settings.values()]
    common = {name: given for name, given in first.items() if all(one.get(name) == given for one in others)}
    console.print(settings_table(common))


def resume_layers(parent: Path, upkeep: dict[str, Any], console: Console, json: Path | None) -> None:
    """Go on with several runs that were stopped."""
    from saelens_matryoshka.runs.layers import resume_many, runs_in

    names = runs_in(parent)
    say = going_on(f"{len(names)} runs in {parent}", console)
    with told_how_to_go_on(parent):
        results = resume_many(parent, on_start=say, **upkeep)
    _show(results, names, parent, console, json)


def _show(
    results: dict[str, Any], names: list[str], parent: Path, console: Console, json: Path | None
) -> None:
    from rich.table import Table

    metrics: dict[str, Any] = {one: r.to_dict() if r else None for one, r in results.items()}
    write_numbers(dumps({"folder": str(parent), "metrics": metrics}), json)
    if on_stdout(json):
        return
    if skipped := [one for one in names if one not in results]:
        console.print(f"Finished before, and left alone: {', '.join(skipped)}.", markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("width", "FVU", "L0", "dead", "CE rec.\nzero"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one, result in results.items():
        if result is None:
            table.add_row(one, "-", "-", "-", "-", "-")
            continue
        full = result.prefixes[-1]
        recovered = "-" if full.ce_recovered is None else f"{full.ce_recovered:.1%}"
        table.add_row(
            one,
            f"{full.width:,}",
            f"{full.fvu:.3f}",
            f"{full.l0:.1f}",
            f"{full.dead_fraction:.1%}",
            recovered,
        )
    if results:
        console.print(table)
    console.print(f"Saved in {parent}, a folder each.", soft_wrap=True, markup=False)
    if set(names) == {f"mlp-{layer}" for layer in range(len(names))}:
        export = f"saelens-matryoshka export {shlex.quote(str(parent))} --to circuit-tracer --out graphs"
        console.print(f"As a circuit-tracer set: {export}", soft_wrap=True, markup=False)
