"""`saelens-matryoshka hooks`: which tensor a transcoder was trained to read."""

from __future__ import annotations

from typing import Annotated

import typer

from saelens_matryoshka.cli.inputs import load_language_model, load_text, named_folder, pick_device
from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.files.valid_json import dumps


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("hooks")(hooks)


@interruptible("Nothing is kept of what was measured: call it again.")
def hooks(
    model: Annotated[str, typer.Argument(help='Language model, as TransformerLens knows it, or "tiny".')],
    transcoder: Annotated[str, typer.Option(help="Folder of a stock SAELens transcoder.")],
    layer: Annotated[int | None, typer.Option(help="Whose MLP. Default: the transcoder's own.")] = None,
    l0: Annotated[
        float | None, typer.Option(help="Its L0 in training. Default: what its files say, if they do.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure on.")] = 4_096,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Text: a dataset of the hub, a folder, or a .txt, .jsonl, .parquet or .csv file. "
            "Default: what it was trained on, if its files say."
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Find out which of the tensors called "the MLP's input" a model reads.

    The transcoder is measured on each of them. Exits with 2 if the one it was trained on is not the one that
    it declares.

      saelens-matryoshka hooks gemma-2-2b --transcoder downloads/layer_19
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    with console.status("measuring"):
        from saelens_matryoshka.formats.frame_report import measure_frames
        from saelens_matryoshka.formats.saelens import open_folder

        sae = open_folder(named_folder(transcoder).expanduser())
        language_model = load_language_model(model, pick_device(None))
        text, _ = load_text(sae, dataset, model=model)
        report = measure_frames(sae, language_model, layer, text, tokens, l0)
    if not on_stdout(json):
        console.print(report.table())
        console.print(report.verdict, markup=False)
    write_numbers(dumps(report.to_dict(), indent=2), json)
    if not report.agrees:
        raise typer.Exit(2)
