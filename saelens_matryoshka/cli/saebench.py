"""`saelens-matryoshka saebench`: SAEBench's evals of every prefix."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from saelens_matryoshka.cli.inputs import (
    is_tiny,
    load_language_model_for,
    load_sae,
    pick_device,
    results_folder,
)
from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.options import Device, Where
from saelens_matryoshka.cli.output import (
    OUTPUT,
    TEXT,
    Console,
    Json,
    on_stdout,
    quieten,
    require_writable,
    write_numbers,
)

_ALL = "core,absorption,sparse_probing,sae_probes,scr,tpp"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("saebench")(saebench)


@interruptible("The evals that are finished are kept; the same command does the others.")
def saebench(
    path: Where,
    evals: Annotated[
        str,
        typer.Option(
            help=f"Which of the evals, comma-separated. Default: {_ALL.replace(',', ', ')}.",
            show_default=False,  # Typer breaks a long word and shows its first line only
        ),
    ] = _ALL,
    prefixes: Annotated[
        str, typer.Option(help="Widths, e.g. 64,256; auto: those it was trained with.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="A model TransformerLens knows; tiny: the embedded one. Default: its own."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text for core: a file, a folder, or a dataset's name on the hub.", rich_help_panel=TEXT
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Folder with train and test files (.jsonl, .csv, .parquet) of text, label and, for scr, "
            "attribute: for sparse_probing, scr and tpp.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of SAEBench's, e.g. scr.n_values=[2,10]. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results. Default: PATH/saebench.", rich_help_panel=OUTPUT),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the language model's activations and probes, kept for other runs.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Of the language model and the SAE.")] = "float32",
    llm_batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.", rich_help_panel=TEXT)] = 32,
    seed: Annotated[int, typer.Option(help="Of SAEBench's probes and samples.")] = 42,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Evaluate again what is there.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = None,
) -> None:
    """Run SAEBench's evals on every prefix.

    What is finished is not evaluated again. Without --text and --labelled, SAEBench's own datasets are
    downloaded; for the embedded model they are made of the standard library.

      saelens-matryoshka saebench output/demo-tiny-layer-2
      saelens-matryoshka saebench output/sae --evals core,tpp \\
          --prefixes 64,256 --text notes/
    """
    from saelens_matryoshka.saebench.requirements import require_sae_bench

    require_writable(json)
    console = Console(stderr=on_stdout(json))
    require_sae_bench()
    options = _settings(settings or [])
    widths = _widths(prefixes)
    quieten()
    warnings.filterwarnings("ignore")
    with console.status("loading") as status:
        from saelens_matryoshka.saebench import SAEBenchError, embedded, run

        device = pick_device(device)
        sae = load_sae(path, device)
        folder = results_folder(path, out, "saebench")
        language_model = load_language_model_for(sae, model, device, dtype=dtype)
        running: Any = text
        labels: Any = labelled
        if is_tiny(model or sae.cfg.metadata.model_name):
            from saelens_matryoshka import tiny

            running = tiny.text.dataset("held_out") if text is None else text
            labels = embedded.standard_library() if labelled is None else labelled
            for item, defaults in embedded.SETTINGS.items():
                options[item] = {**defaults, **options.get(item, {})}
        status.update("evaluating")
        try:
            result = run(
                sae,
                language_model,
                folder,
                evals=[part.strip() for part in evals.split(",") if part.strip()],
                prefixes=widths,
                text=running,
                labelled=labels,
                settings=options,
                seed=seed,
                llm_batch_size=llm_batch_size,
                cache=cache,
                overwrite=overwrite,
                on_start=lambda item, width: status.update(f"{item}, prefix {width}"),
            )
        except SAEBenchError as error:
            if error.result.evals:
                console.print(error.result.table())
            raise
    write_numbers(result.to_json(), json)
    if on_stdout(json):
        return
    console.print(result.table())
    console.print(f"Saved in {result.folder}: results.json, and a folder for each prefix.", markup=False)


def _widths(prefixes: str) -> list[int] | str:
    if prefixes == "auto":
        return prefixes
    try:
        return [int(part) for part in prefixes.split(",")]
    except ValueError:
        raise ValueError(f"--prefixes={prefixes!r}: expected auto or widths, e.g. 64,256.") from None


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """`eval.name=value`, the value as YAML."""
    from saelens_matryoshka.files.plain_yaml import plain_values

    settings: dict[str, dict[str, Any]] = {}
    for setting in given:
        key, equals, value = setting.partition("=")
        eval_name, dot, name = key.partition(".")
        if not (equals and dot and eval_name and name):
            raise ValueError(f"--set {setting!r}: expected EVAL.NAME=VALUE, e.g. scr.n_values=[2,10].")
        try:
            settings.setdefault(eval_name, {})[name] = plain_values(value)
        except ValueError as error:
            raise ValueError(f"--set {setting!r}: the value is not YAML: {error}") from None
    return settings
