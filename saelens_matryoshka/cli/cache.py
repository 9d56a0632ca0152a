"""`saelens-matryoshka cache`: activations on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box

from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.cli.settings import given_beside
from saelens_matryoshka.files.valid_json import dumps

if TYPE_CHECKING:
    from saelens_matryoshka.cache import Manifest
    from saelens_matryoshka.runs.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("cache", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(cache)


@interruptible("The files that are complete are kept; the same command makes the others.")
def cache(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The cache. With no other option: say what is in it.")],
    preset: Annotated[str | None, typer.Option(help="Settings that go with a model, as in train.")] = None,
    mapping: Annotated[
        str | None, typer.Option(help="Sources and targets, as in train; several with commas between.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Of the mapping, e.g. 8, 0-11 or 0,4,8.")] = None,
    hook: Annotated[
        list[str] | None, typer.Option(help="A hook by name, beside or in place of these; may be repeated.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens to train on, e.g. 100M.")] = "2M",
    held_out: Annotated[str, typer.Option(help="Tokens of other documents, to evaluate on.")] = "100k",
    dtype: Annotated[
        str, typer.Option(help="bfloat16, int8 (with a scale per token) or float32.")
    ] = "bfloat16",
    shard_mb: Annotated[int, typer.Option(help="Size of a file; rows are shuffled within one.")] = 512,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of a cache and compare the checksums.")
    ] = False,
    json: Json = None,
) -> None:
    """Write activations to disk once, to train on them many times.

    Which model and text is said with the flags of train: --model_name, --dataset_path, --context_size,
    --exclude_special_tokens and so on. The same command again makes what is missing or damaged.

      saelens-matryoshka cache acts --preset gpt2 --layers 0-11 --tokens 100M
      saelens-matryoshka cache acts --model_name tiny --mapping mlp --layers 2
      saelens-matryoshka cache acts                  (what is in it)
      saelens-matryoshka cache acts --verify
      saelens-matryoshka train --cache acts --layers 0-11 --d_sae 12288 -k 32
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    others = given_beside(context, "folder", "verify", "json")
    if verify and others:
        raise ValueError(f"--verify reads what is in the cache: leave out {' '.join(others)}.")
    if verify or not others:
        _show(folder, console, json, verify=verify)
        return
    with console.status("loading"):
        from saelens_matryoshka.cache.writer import require_own_folder

        require_own_folder(folder)
        settings = _settings(context.args, preset, mapping, layers, hook or [])
        from saelens_matryoshka.cache import CacheError, CacheSettings, open_cache, write_cache
        from saelens_matryoshka.layers.lockstep import load_model_for
        from saelens_matryoshka.runs.training import overrides

        wanted = CacheSettings.for_runs(
            [one.cfg for one in settings],
            training_tokens=_count("--tokens", tokens),
            held_out_tokens=_count("--held-out", held_out),
            dtype=dtype,
            shard_bytes=shard_mb << 20,
        )
        replaced = overrides(settings[0])
        model = replaced.get("override_model") or load_model_for([one.cfg for one in settings])
        try:
            open_cache(folder)
            whole = True
        except CacheError:
            whole = False
    if not whole:
        hooks = f"{len(wanted.hook_names)} hooks of {wanted.model_name}"
        console.print(f"Writing {hooks} to {folder}", markup=False)
    started = time.monotonic()
    manifest = write_cache(
        folder, model, wanted, replaced.get("override_dataset"), progress=not on_stdout(json)
    )
    _print(folder, manifest, console, json)
    took = f"Written in {time.monotonic() - started:,.0f} s."
    console.print("It is complete: nothing had to be written." if whole else took)
    if manifest.rows("train") < 0.5 * wanted.training_tokens:
        console.print(f"The text had no more than these tokens; {wanted.training_tokens:,} were asked for.")


def _settings(
    args: list[str], preset: str | None, mapping: str | None, layers: str | None, hooks: list[str]
) -> list[Settings]:
    """The settings of runs that read what is to be written."""
    from saelens_matryoshka.runs.fields import Given
    from saelens_matryoshka.runs.layers import each_of
    from saelens_matryoshka.runs.presets import load_preset
    from saelens_matryoshka.runs.settings import read_flags, resolve

    flags = read_flags(args)
    # of no matter here, and asked for by every run
    idle = {"d_sae": Given(8, "cache"), "k": Given(1.0, "cache"), "matryoshka_widths": Given([8], "cache")}
    below = {} if preset is None else dict(load_preset(preset).settings)
    base = [{**below, **idle}, flags]
    each: list[dict[str, Given]] = []
    if mapping or layers:
        each += each_of(layers, mapping)
    elif "hook_name" in flags or not hooks:
        each.append({})
    for hook in hooks:
        sae = {"architecture": "matryoshka_sae", "hook_name": hook, "d_in": 1}
        each.append({name: Given(value, "flag") for name, value in sae.items()})
    found = []
    for one in each:
        is_hook = "hook_name" in one
        common = [_without_hooks(layer) for layer in base] if is_hook else base
        found.append(resolve([*common, one], recommended=False))
    return found


def _without_hooks(layer: dict[str, Any]) -> dict[str, Any]:
    of_hooks = ("mapping", "layer", "hook_name_out", "input_gain", "d_out", "architecture")
    return {name: given for name, given in layer.items() if name not in of_hooks}


def _count(flag: str, text: str) -> int:
    """A number of tokens, like 250000, 1e8, 500k, 2M or 1B."""
    from saelens_matryoshka.runs.fields import whole_number

    count = whole_number(text)
    if isinstance(count, str) or count < 0:
        raise ValueError(f"{flag} {text!r} must be a number of tokens, like 250000, 500k, 2M or 1e8.")
    return count


def _show(folder: Path, console: Console, json: Path | None, *, verify: bool) -> None:
    from saelens_matryoshka.cache import Manifest, verify_cache

    manifest = verify_cache(folder) if verify else Manifest.load(folder)
    _print(folder, manifest, console, json)
    if verify:
        n = len(manifest.train) + len(manifest.held_out)
        console.print(f"All {n} files have the checksums they were written with.")
    if not manifest.complete:
        console.print("It is not complete: the command that was writing it goes on.")


def _print(folder: Path, manifest: Manifest, console: Console, json: Path | None) -> None:
    shown = {
        "folder": str(folder),
        "complete": manifest.complete,
        "tokens": {"train": manifest.rows("train"), "held_out": manifest.rows("held_out")},
        "bytes": manifest.bytes,
        "hooks": {name: vars(hook) for name, hook in manifest.hooks.items()},
        "settings": manifest.settings,
    }
    write_numbers(dumps(shown), json)
    if on_stdout(json):
        return
    from rich.table import Table

    settings = manifest.settings
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("hook", overflow="fold")
    table.add_column("width", justify="right", no_wrap=True)
    table.add_column("frame", no_wrap=True)
    for name, hook in manifest.hooks.items():
        table.add_row(name, f"{hook.width:,}", hook.frame)
    console.print(table)
    console.print(
        f"{settings['model_name']} on {settings['dataset_path']}, "
        f"prompts of {settings['context_size']} tokens\n"
        f"{manifest.rows('train'):,} tokens to train on, {manifest.rows('held_out'):,} held out\n"
        f"{manifest.bytes / 1e9:,.2f} GB of {settings['dtype']} in "
        f"{len(manifest.train) + len(manifest.held_out)} files in {folder}",
        soft_wrap=True,
        markup=False,
    )
