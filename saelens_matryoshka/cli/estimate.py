"""`saelens-matryoshka estimate`: memory and time of a training run, before anything is downloaded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.cli.settings import read_mesh, read_sources, require_no_layer, require_one_process

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*((?:[kmgt]i?)?)b?\s*", re.IGNORECASE)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "estimate",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        no_args_is_help=True,
    )(estimate)


@interruptible("Nothing is kept of an estimate: call it again.")
def estimate(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="Settings that go with a model.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    mapping: Annotated[str | None, typer.Option(help="What to learn; see `train`.")] = None,
    layer: Annotated[int | None, typer.Option(help="Of the mapping.")] = None,
    layers_: Annotated[
        str | None, typer.Option("--layers", help="Several, e.g. 0-11, in lockstep; see `train`.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="As many as torchrun is to start. The memory is that of one of them."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help='"dictionary" divides the latents among them; see `train`.')
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Of each copy of the dictionary; see `train`.")] = None,
    saelens_defaults: Annotated[
        bool,
        typer.Option("--saelens-defaults", help="SAELens's defaults instead of the recommended settings."),
    ] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of each GPU, e.g. 24GB, of another machine than this.")
    ] = None,
    cpu_memory: Annotated[str | None, typer.Option(help="The same for the main memory.")] = None,
    no_time: Annotated[bool, typer.Option("--no-time", help="Leave out the calibration run.")] = False,
    json: Json = None,
) -> None:
    """Say what a run will take: memory and time, before any download.

    Takes the settings of `train`. The time comes from a few real steps on this machine, if it has the device.
    Where it does not fit, the one setting is named that helps most, and the exit code is 1.

      saelens-matryoshka estimate --preset gpt2
      saelens-matryoshka estimate --preset gemma-2-2b --device cuda \\
          --gpu-memory 24GB
      saelens-matryoshka estimate --preset gpt2 --layers 0-11
      saelens-matryoshka estimate --preset gemma-2-2b --device cuda \\
          --gpu-memory 80GB --d_sae 1048576 --shard dictionary --processes 8
      saelens-matryoshka estimate --model_name gpt2 --mapping mlp --layer 8 \\
          -k 64 --d_sae 12288 --dataset_path any --training_tokens 50M
    """
    require_writable(json)
    quieten()
    console = Console(stderr=True)
    mesh = read_mesh(shard, shards, processes)
    available = {
        device: read_size(flag, given)
        for device, flag, given in (("cuda", "--gpu-memory", gpu_memory), ("cpu", "--cpu-memory", cpu_memory))
        if given is not None
    }
    with console.status("looking up the shapes"):
        from saelens_matryoshka.runs.estimate import estimate as estimate_run
        from saelens_matryoshka.runs.layers import each_of, resolve_many
        from saelens_matryoshka.runs.settings import resolve

        several = layers_ is not None or "," in (mapping or "")
        own = {"mapping": None if several else mapping, "layer": layer}
        sources, _, runs = read_sources(context.args, preset=preset, config=config, own=own)
        if several or runs is not None:
            require_one_process(mesh)
            require_no_layer(layer)
            many = resolve_many(sources, each_of(layers_, mapping, runs), recommended=not saelens_defaults)
            cfgs = [one.cfg for one in many.values()]
        else:
            cfgs = [resolve(sources, recommended=not saelens_defaults).cfg]
    with console.status("a few steps to calibrate the time" if not no_time else "counting"):
        result = estimate_run(*cfgs, available=available, with_time=not no_time, mesh=mesh)
    if not on_stdout(json):
        Console().print(result.tables())
    write_numbers(result.to_json(), json)
    if result.fits is False:
        raise typer.Exit(1)


def read_size(flag: str, text: str) -> int:
    """Bytes of "24GB", "80 GiB" or "16g".

    Raises:
        ValueError: it is no such thing.
    """
    found = _SIZE.fullmatch(text)
    n_bytes = math.inf if found is None else float(found[1]) * _UNITS[found[2].lower()]
    if n_bytes == math.inf:  # so are digits beyond every float
        raise ValueError(f"{flag} {text!r} is no size: write e.g. 24GB or 24GiB.")
    return int(n_bytes)
