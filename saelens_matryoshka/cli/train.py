"""`saelens-matryoshka train`: a run in a folder of its own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from saelens_matryoshka.cli.interruption import NOTHING_WRITTEN, going_on, interruptible, told_how_to_go_on
from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.cli.settings import (
    given_beside,
    read_mesh,
    read_sources,
    require_no_layer,
    require_one_process,
    settings_table,
)
from saelens_matryoshka.files.valid_json import dumps

if TYPE_CHECKING:
    from saelens_matryoshka.evaluation.result import EvalResult
    from saelens_matryoshka.parallel import Mesh, Sharding
    from saelens_matryoshka.runs.folder import RunFolder
    from saelens_matryoshka.runs.settings import Settings

_FOLDER = "The folder of the run"
_SCALE = "Several layers, many GPUs"
_MORE = "More"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "train",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        no_args_is_help=True,
    )(train)


@interruptible(NOTHING_WRITTEN)
def train(
    context: typer.Context,
    preset: Annotated[
        str | None, typer.Option(help="Settings that go with a model; `presets` lists them.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file of settings, e.g. a run's own config.yaml, to repeat it."),
    ] = None,
    mapping: Annotated[
        str | None,
        typer.Option(
            help="What to learn: mlp, attention, layer, or cross-layer:8-12. A transcoder predicts the "
            "target from the source, an SAE (--architecture matryoshka_sae) reconstructs the target."
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="The layer of the mapping. Without --mapping: the layer whose output an SAE reconstructs."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help='Under torchrun: "dictionary" divides the latents among the processes. Default: only the '
            "rows of a batch are divided.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            help="Of --shard dictionary: how many, e.g. the GPUs of a node. Every so many processes have a "
            "copy, and their part of the rows. Default: as many as processes.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    layers_: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Several, e.g. 0-11 or 0,4,8: one run each, in lockstep, from one pass of the language "
            "model; with several mappings (mlp,attention), of each. Given again, the command goes on.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Activations on disk (see the command cache), in place of the language model.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a run that was stopped: go on with it, exactly. Settings are the run's own.",
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="How many checkpoints to keep, 0 for all. Default: 2.", rich_help_panel=_FOLDER),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(
            help="Minutes between two checkpoints; --n_checkpoints, SAELens's, come on top. Default: 15.",
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    skip_bad_batches: Annotated[
        int | None,
        typer.Option(
            help="Batches of NaN or Inf to leave out before the run stops. Default: 0.",
            rich_help_panel=_MORE,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the settings, the sites and the estimate, and do nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run is kept in OUT/MODEL/MAPPING/NAME. Default: results.", rich_help_panel=_FOLDER
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run. Default: made of its size and the time. (SAELens's --output_path FOLDER "
            "takes the place of --out and --name.)",
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between two lines of metrics.jsonl.", rich_help_panel=_MORE)
    ] = 20,
    wandb: Annotated[
        bool,
        typer.Option(
            "--wandb",
            help="Log to Weights & Biases as well (WANDB_MODE=offline: to disk).",
            rich_help_panel=_MORE,
        ),
    ] = False,
    saelens_defaults: Annotated[
        bool,
        typer.Option(
            "--saelens-defaults",
            help="SAELens's defaults, not the recommended settings, for all that is not given.",
            rich_help_panel=_MORE,
        ),
    ] = False,
    json: Json = None,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="List SAELens's flags too.", rich_help_panel=_MORE)
    ] = False,
) -> None:
    """Train a Matryoshka SAE or transcoder in a folder of its own.

    SAELens's own flags are taken too: --model_name, --dataset_path, --architecture, --d_sae, -k,
    --matryoshka_widths, --training_tokens, --lr and so on; --help-all lists them. A flag wins over the file,
    the file over the preset; what none of them says is the recommended setting, or SAELens's default.

      saelens-matryoshka train --preset tiny --name first
      saelens-matryoshka train --preset gpt2 --layer 5 --name first --dry-run
      saelens-matryoshka train --model_name gpt2 --mapping mlp --layer 8 \\
          --d_sae 12288 -k 64 --dataset_path Skylion007/openwebtext \\
          --training_tokens 50M
      saelens-matryoshka train --preset gpt2 --layers 0-11 --name all
      saelens-matryoshka train --config results/gpt2/mlp-8/first/config.yaml
      saelens-matryoshka train --resume results/gpt2/mlp-8/first
      torchrun --nproc-per-node 8 -m saelens_matryoshka train --preset gpt2
      torchrun --nnodes 8 --nproc-per-node 8 ... -m saelens_matryoshka train \\
          --preset gemma-2-2b --d_sae 131072 --shard dictionary --shards 8
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    if help_all:
        _print_all_help(context)
        return
    from saelens_matryoshka.upkeep.keeper import Upkeep

    given = {"keep": keep, "checkpoint_minutes": checkpoint_minutes, "skip_bad_batches": skip_bad_batches}
    upkeep = {field: value for field, value in given.items() if value is not None}
    Upkeep(**upkeep)
    mesh = read_mesh(shard, shards)
    sharding = cast("Sharding | None", shard)
    if resume is not None:
        if others := given_beside(context, *given, "resume", "shard", "shards", "json"):
            raise ValueError(f"--resume goes on with the run's own settings: leave out {' '.join(others)}.")
        _resume(resume, upkeep, console, json, mesh=mesh, sharding=sharding, shards=shards)
        return
    with console.status("resolving the settings"):
        from saelens_matryoshka.runs.folder import require_name
        from saelens_matryoshka.runs.settings import require_devices, resolve

        several = layers_ is not None or "," in (mapping or "")
        own = {
            "mapping": None if several else mapping,  # of several, each has its own
            "layer": layer,
            "log_to_wandb": wandb or None,
        }
        sources, name_in_file, runs = read_sources(
            context.args, preset=preset, config=config, own=own, cache=cache
        )
        name = name_in_file if name is None else name
        if name is not None:
            require_name(name)
    if several or runs is not None:
        from saelens_matryoshka.cli.layers import train_layers
        from saelens_matryoshka.runs.layers import each_of

        require_one_process(mesh)
        require_no_layer(layer)
        train_layers(
            sources,
            each_of(layers_, mapping, runs),
            out=out,
            name=name,
            recommended=not saelens_defaults,
            dry_run=dry_run,
            log_every=log_every,
            upkeep=upkeep,
            json=json,
            console=console,
        )
        return
    with console.status("resolving the settings"):
        settings = resolve(sources, recommended=not saelens_defaults)
        folder = _folder(settings, out, name)
        folder.require_unused()
        if not dry_run:
            require_devices(settings.cfg)
    if dry_run:
        _show_plan(settings, folder, console, json, mesh)
        return
    from saelens_matryoshka.runs.training import train_run

    console.print(f"[bold]Training[/] {escape(_summary(settings))}\n  in {escape(str(folder.path))}")
    with told_how_to_go_on(folder.path):
        result = train_run(
            settings,
            folder,
            log_every=log_every,
            upkeep=Upkeep(**upkeep),
            command=sys.argv[1:],
            sharding=sharding,
            shards=shards,
        )
    _show_result(result, folder, console, json)


def _resume(
    path: Path,
    upkeep: dict[str, Any],
    console: Console,
    json: Path | None,
    *,
    mesh: Mesh,
    sharding: Sharding | None,
    shards: int | None,
) -> None:
    from saelens_matryoshka.runs.folder import RunFolder
    from saelens_matryoshka.runs.layers import runs_in
    from saelens_matryoshka.runs.training import resume_run

    if runs_in(path):
        require_one_process(mesh)
        from saelens_matryoshka.cli.layers import resume_layers

        resume_layers(path, upkeep, console, json)
        return
    folder = RunFolder(path)

    with told_how_to_go_on(path):
        result = resume_run(folder, sharding, shards, on_start=going_on(str(path), console), **upkeep)
    _show_result(result, folder, console, json)


def _folder(settings: Settings, out: Path | None, name: str | None) -> RunFolder:
    """Where the run goes: OUT/MODEL/MAPPING/NAME, or SAELens's output_path."""
    from saelens_matryoshka.runs.folder import RunFolder, new_run_folder, run_folder

    if "output_path" not in settings.given:
        out = out or Path("results")
        if name is None:
            return new_run_folder(out, settings)
        return run_folder(out, settings.cfg.model_name, settings.mapping, name)
    given = settings.given["output_path"]
    if given.value is None:
        raise ValueError(f"{given.called('output_path')}: a run needs a folder.")
    if out is not None or name is not None:
        raise ValueError(
            f"{given.called('output_path')} is the run's folder, and so are --out and --name: give one."
        )
    return RunFolder(Path(given.value))


def _show_result(result: EvalResult | None, folder: RunFolder, console: Console, json: Path | None) -> None:
    write_numbers(dumps({"folder": str(folder.path), "metrics": result.to_dict() if result else None}), json)
    if on_stdout(json):
        return
    if result is None:
        console.print("The dataset is too small to hold text out: nothing was evaluated.")
    else:
        console.print(result.table())
        console.print("text: held out of the training data")
    console.print(
        f"Saved in {folder.path}, as SAELens saves it:\n"
        f"  sae = SAE.load_from_disk({str(folder.path)!r})\n"
        "Its page of curves, levels and latents:\n"
        f"  saelens-matryoshka report {shlex.quote(str(folder.path))}",
        soft_wrap=True,
        markup=False,
    )


def _summary(settings: Settings) -> str:
    cfg = settings.cfg
    source, target = cfg.hook_name, getattr(cfg.sae, "hook_name_out", "")
    n_steps = -(-cfg.training_tokens // cfg.train_batch_size_tokens)
    return (
        f"a {cfg.sae.architecture()} on {cfg.model_name}\n"
        f"  {source}{f' → {target}' if target else ''}\n"
        f"  prefixes of {', '.join(f'{width:,}' for width in cfg.sae.matryoshka_widths)} latents, "
        f"k = {cfg.sae.k:g}\n"
        f"  {cfg.training_tokens:,} tokens in {n_steps:,} steps"
    )


def _show_plan(
    settings: Settings, folder: RunFolder, console: Console, json: Path | None, mesh: Mesh
) -> None:
    from saelens_matryoshka.parallel import is_first_process
    from saelens_matryoshka.runs.estimate import estimate

    if not is_first_process():
        return
    values = settings.values()
    if not on_stdout(json):
        _show_settings(settings, folder, console, len(values))
    with console.status("estimating memory and time"):
        found = estimate(settings.cfg, mesh=mesh)
    if not on_stdout(json):
        console.print(found.tables())
    plan = {"folder": str(folder.path), "mapping": settings.mapping, "settings": values}
    write_numbers(dumps({**plan, "estimate": found.to_dict()}, indent=2), json)


def _show_settings(settings: Settings, folder: RunFolder, console: Console, n_values: int) -> None:
    console.print(f"[bold]Would train[/] {escape(_summary(settings))}\n  in {escape(str(folder.path))}\n")
    console.print(settings_table(settings.given))
    n_left = n_values - len(settings.given)
    console.print(f"{n_left} other settings are SAELens's defaults; --json prints them too.")


def _print_all_help(context: typer.Context) -> None:
    from saelens_matryoshka.runs.settings import read_flags
    from saelens_matryoshka.seams import parse_runner_config

    print(context.get_help())
    print("SAELens's flags, with our architectures:\n")
    asked = read_flags(context.args).get("architecture")
    architecture = "matryoshka_transcoder" if asked is None else str(asked.value)
    parse_runner_config(["--architecture", architecture, "--help"])
