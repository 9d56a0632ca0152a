"""`saelens-matryoshka import` and `export`: other tools' files into stock SAELens folders, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from saelens_matryoshka.cli.inputs import load_language_model, load_text, named_folder, pick_device
from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.files.valid_json import dumps

FROM = "saelens, sparsify, dictionary-learning, circuit-tracer, gemma-scope, gemma-scope-2, llamascopium or "
FROM += "matryoshka-checkpoint"
TO = "circuit-tracer, sparsify, dictionary-learning or saelens"

_THRESHOLDS, _HUB, _UNSAID = "Thresholds", "The hub", "What the files do not say"

ModelOption = Annotated[
    str | None,
    typer.Option(help='Language model, as TransformerLens knows it, "tiny" for the embedded one.'),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help="Text to fit on: a dataset of the hub, a folder, or a .txt, .jsonl, .parquet or .csv file. "
        "Default: what it was trained on, if its files say.",
        rich_help_panel=_THRESHOLDS,
    ),
]
CalibrateOption = Annotated[
    bool,
    typer.Option(
        "--calibrate-l0", help="Fit JumpReLU thresholds on text (needs --model).", rich_help_panel=_THRESHOLDS
    ),
]
L0Option = Annotated[
    float | None,
    typer.Option(
        help="Active latents per token to fit to. Default: the model's own k.", rich_help_panel=_THRESHOLDS
    ),
]
TokensOption = Annotated[
    int, typer.Option(min=1, help="Tokens to fit thresholds on.", rich_help_panel=_THRESHOLDS)
]
FrameOption = Annotated[
    str | None,
    typer.Option(
        help="Move a transcoder of the MLP's input to the tensor before ('normalized') or after "
        "('mlp_in') the norm's gain (needs --model)."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("import")(import_)
    app.command("export")(export)


@interruptible("A folder is written whole or not at all: call it again if it is not there.")
def import_(
    src: Annotated[
        str,
        typer.Argument(
            help="A file or folder, a hub repository 'user/name' or 'user/name/folder', or a W&B artifact "
            "'entity/project/artifact:version'."
        ),
    ],
    from_: Annotated[str, typer.Option("--from", help=f"Its format: {FROM}.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    id: Annotated[str | None, typer.Option(help="Only this one, a path in SRC. Default: all.")] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            help="Nested widths where the files do not say, e.g. 64,256,1024.", rich_help_panel=_UNSAID
        ),
    ] = None,
    hook_name: Annotated[
        str | None,
        typer.Option(
            help="Hook it reads, where the files do not say; {layer} is its layer.", rich_help_panel=_UNSAID
        ),
    ] = None,
    hook_name_out: Annotated[
        str | None,
        typer.Option(help="Hook a transcoder predicts, where the files do not say.", rich_help_panel=_UNSAID),
    ] = None,
    model: ModelOption = None,
    calibrate: CalibrateOption = False,
    l0: L0Option = None,
    tokens: TokensOption = 16_384,
    dataset: DatasetOption = None,
    frame: FrameOption = None,
    json: Json = None,
) -> None:
    """Turn other tools' SAEs and transcoders into stock SAELens folders.

      saelens-matryoshka import EleutherAI/sae-llama-3-8b-32x \\
          --id layers.8 --from sparsify --out sae
      saelens-matryoshka import EleutherAI/skip-transcoder-Llama-3.2-1B-131k \\
          --id layers.3.mlp --from sparsify --out llama-3 \\
          --model meta-llama/Llama-3.2-1B --calibrate-l0 --frame normalized
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    with console.status("loading"):
        from saelens_matryoshka.formats.export import import_models
        from saelens_matryoshka.formats.registry import Unstated

        change = _change(model, frame=frame, calibrate=calibrate, l0=l0, tokens=tokens, dataset=dataset)
        given = Unstated(
            widths=_widths(widths),
            hook_name=hook_name,
            hook_name_out=hook_name_out,
            model_name=model,
        )
        models = import_models(src, from_, out, item=id, given=given, change=change)

    def folder_of(found: Any) -> Path:
        return out if len(models) == 1 else out / found.name

    summary = [{"folder": str(folder_of(found)), **_summary(found.coder)} for found in models]
    write_numbers(dumps(summary, indent=2), json)
    if on_stdout(json):
        return
    for found in models:
        coder = found.coder
        target = coder.metadata.get("hook_name_out")
        arrow = f" → {target}" if target else ""
        levels = f", widths {', '.join(map(str, coder.widths))}" if len(coder.widths) > 1 else ""
        console.print(
            f"{coder.metadata['hook_name']}{arrow}: {coder.d_sae:,} latents, {coder.activation}{levels}",
            markup=False,
        )
    console.print(f"\nIn {out}. SAE.load_from_disk({str(folder_of(models[0]))!r}) loads it.", markup=False)


@interruptible("A folder is written whole or not at all: call it again if it is not there.")
def export(
    path: Annotated[
        str, typer.Argument(help="Folder of a stock model, or of several (layer_0, layer_1, ...).")
    ],
    to: Annotated[str, typer.Option(help=f"The format to write: {TO}.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    width: Annotated[
        list[int] | None,
        typer.Option(help="Only this prefix; several times for several, each a set of its own."),
    ] = None,
    model: ModelOption = None,
    calibrate: CalibrateOption = False,
    l0: L0Option = None,
    topk: Annotated[
        int | None,
        typer.Option(
            help="Drop the thresholds and keep the K largest of every token: another function.",
            rich_help_panel=_THRESHOLDS,
        ),
    ] = None,
    tokens: TokensOption = 16_384,
    dataset: DatasetOption = None,
    frame: FrameOption = None,
    upload: Annotated[
        str | None, typer.Option(help="Then upload to this hub repository.", rich_help_panel=_HUB)
    ] = None,
    private: Annotated[
        bool, typer.Option(help="If the repository is new, make it private.", rich_help_panel=_HUB)
    ] = False,
    json: Json = None,
) -> None:
    """Write SAEs and transcoders for other tools, whole or a prefix.

    A model card goes with them.

      saelens-matryoshka export output/transcoder --to saelens \\
          --width 256 --out small
      saelens-matryoshka export output/transcoders --to circuit-tracer \\
          --out graphs --upload me/graphs
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    with console.status("exporting"):
        from saelens_matryoshka.formats.export import export_models
        from saelens_matryoshka.formats.export import upload as upload_folder

        if topk is not None and calibrate:
            raise ValueError("--topk drops the thresholds that --calibrate-l0 fits: give one of them.")
        change = _change(model, frame=frame, calibrate=calibrate, l0=l0, tokens=tokens, dataset=dataset)
        written = export_models(
            named_folder(path), to, out, widths=width or (), change=change, topk=topk, repo_id=upload
        )
    for folder in written:
        console.print(f"{to}: {folder}", markup=False)
    url = None
    if upload:
        with console.status(f"uploading to {upload}"):
            url = upload_folder(out, upload, private=private)
        console.print(url, markup=False)
    write_numbers(dumps({"format": to, "folders": [str(folder) for folder in written], "url": url}), json)


def _summary(coder: Any) -> dict[str, Any]:
    return {
        "hook_name": coder.metadata["hook_name"],
        "hook_name_out": coder.metadata.get("hook_name_out"),
        "d_sae": coder.d_sae,
        "activation": coder.activation,
        "widths": list(coder.widths),
    }


def _change(
    model: str | None,
    *,
    frame: str | None,
    calibrate: bool,
    l0: float | None,
    tokens: int,
    dataset: str | None,
) -> Callable[[Any], Any] | None:
    """What the options ask to be done with each model on the way."""
    if l0 is not None and not calibrate:
        raise ValueError("--l0 says what --calibrate-l0 fits to: give both.")
    if frame is None and not calibrate:
        return None
    if (frame or calibrate) and model is None:
        raise ValueError(f"--{'frame' if frame else 'calibrate-l0'} needs the language model: --model NAME.")
    from saelens_matryoshka.formats.frames import to_frame
    from saelens_matryoshka.formats.thresholds import calibrate as fit
    from saelens_matryoshka.formats.thresholds import stand_in

    language_model = load_language_model(model, pick_device(None)) if model else None

    def change(coder: Any) -> Any:
        # a HookedTransformer has the normalised tensor to fit on, and not the one behind the gain
        if frame == "normalized":
            coder = to_frame(coder, frame, language_model)
        if calibrate:
            text, _ = load_text(stand_in(coder), dataset, model=model)
            coder = fit(coder, language_model, text, l0, tokens)
        if frame not in (None, "normalized"):
            coder = to_frame(coder, frame, language_model)
        return coder

    return change


def _widths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        raise ValueError(f"--widths {text!r} must be whole numbers, e.g. 64,256,1024.") from None
