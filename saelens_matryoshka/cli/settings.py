"""The settings that `train` and `estimate` are given: a preset, a file and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rich import box

if TYPE_CHECKING:
    import typer
    from rich.table import Table

    from saelens_matryoshka.parallel import Mesh, Sharding
    from saelens_matryoshka.runs.fields import Given
    from saelens_matryoshka.runs.settings import SettingsSource


class Sources(NamedTuple):
    """What was given, for `saelens_matryoshka.runs.settings.resolve`."""

    settings: list[SettingsSource]
    """lowest first: the preset's, the cache's, the file's, the flags'"""
    name: str | None
    """of the run, if the file has one"""
    runs: Any
    """of the file: what each of several runs has of its own; None for one run"""


def read_sources(
    args: Sequence[str],
    *,
    preset: str | None,
    config: Path | None,
    own: Mapping[str, Any],
    cache: Path | None = None,
) -> Sources:
    """Read the preset, the cache's settings, the file and the flags.

    Args:
        args: SAELens's flags.
        preset: Its name; the file may give it as well.
        config: A YAML file.
        own: Flags that the command has taken; those that are None were not given.
        cache: Activations on disk.

    Raises:
        ValueError: one of them cannot be read.
    """
    from saelens_matryoshka.runs.fields import Given, read_value
    from saelens_matryoshka.runs.presets import load_preset
    from saelens_matryoshka.runs.settings import read_file, read_flags

    flags = read_flags(args) | {key: Given(value, "flag") for key, value in own.items() if value is not None}
    file = {} if config is None else read_file(config)
    texts: dict[str, str | None] = {}
    for key in ("preset", "name"):
        given = file.pop(key, None)
        texts[key] = None if given is None else read_value(key, given, str)
    runs = file.pop("runs", None)
    preset = texts["preset"] if preset is None else preset
    lowest = {} if preset is None else load_preset(preset).settings
    cached = {} if cache is None else _cache_settings(cache)
    return Sources([lowest, cached, file, flags], texts["name"], None if runs is None else runs.value)


def given_beside(context: typer.Context, *parameters: str) -> list[str]:
    """The flags that were given, but for those of these parameters, and all words that are SAELens's."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in parameters}
    given = [name for name, source in sources.items() if getattr(source, "name", "") == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in given] + context.args


def require_no_layer(layer: int | None) -> None:
    """Refuse --layer beside what names several."""
    if layer is not None:
        raise ValueError(f"--layer {layer} is of a single run: with several, give --layers.")


def read_mesh(shard: str | None, shards: int | None, processes: int | None = None) -> Mesh:
    """How processes are to divide the work, before anything is loaded that they would share.

    Args:
        shard: --shard.
        shards: --shards.
        processes: How many there would be; None, those that torchrun has started.

    Raises:
        ValueError: they cannot divide it so.
    """
    from saelens_matryoshka.parallel import mesh_shape

    if shard not in (None, "dictionary"):
        raise ValueError(f"--shard {shard} is not known: 'dictionary' divides the latents among processes.")
    return mesh_shape(cast("Sharding | None", shard), shards, processes)


def require_one_process(mesh: Mesh) -> None:
    """Refuse several processes for dictionaries in lockstep."""
    if mesh.size > 1:
        raise ValueError(
            "several layers are trained in lockstep by one process: under torchrun, or with --shard, train "
            "one --layer."
        )


def settings_table(given: Mapping[str, Given]) -> Table:
    """What was given, and by whom."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for name, one in given.items():
        table.add_row(name, Text(str(one.value)), Text(one.origin))
    return table


def _cache_settings(folder: Path) -> dict[str, Given]:
    """The settings that a cache decides."""
    from saelens_matryoshka.cache import open_cache
    from saelens_matryoshka.runs.fields import Given

    values = {
        **open_cache(folder).manifest.runner_fields(),
        "use_cached_activations": True,
        "cached_activations_path": str(folder),
    }
    return {name: Given(value, "cache") for name, value in values.items()}
