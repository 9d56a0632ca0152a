"""`saelens-matryoshka report`: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saelens_matryoshka.cli.inputs import (
    load_language_model_for,
    load_sae,
    load_text,
    pick_device,
    results_folder,
)
from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.options import BatchSize, ContextSize, Dataset, Device, Model, Skip, Split
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
from saelens_matryoshka.cli.samples import obtain_samples, writing_samples
from saelens_matryoshka.files.atomic import obstacle
from saelens_matryoshka.files.valid_json import dumps


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("report")(report)


@interruptible("No page was written; the samples are kept if they were complete.")
def report(
    path: Annotated[
        str, typer.Argument(help="A run's folder, a folder saved by SAELens, or RELEASE:SAE_ID.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: PATH/report.html.", rich_help_panel=OUTPUT)
    ] = None,
    title: Annotated[str | None, typer.Option(help="Default: the folder's name.")] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens to take samples from, if PATH/samples is not there yet.", rich_help_panel=TEXT
        ),
    ] = 1_000_000,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="Leave the latents out; needs no language model.")
    ] = False,
    model: Model = None,
    dataset: Dataset = None,
    split: Split = "train",
    skip: Skip = 0,
    context_size: ContextSize = None,
    batch_size_prompts: BatchSize = 8,
    device: Device = None,
    json: Json = None,
) -> None:
    """Write an HTML page about a run: quality, curves, levels, latents.

    It takes metrics.jsonl, metrics.json and samples from the run's folder, each if it is there, and collects
    the samples if they are not. The page is one file and opens without a network.

      saelens-matryoshka report results/tiny/mlp-2/first
      saelens-matryoshka report gpt2-small-res-jb:blocks.8.hook_resid_pre \\
          --out gpt2.html
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    device = pick_device(device)
    folder = Path(path)
    target = results_folder(path, out, "report.html")
    require_writable(target, "--out")
    with console.status("loading"):
        from saelens_matryoshka.report.page import write_page
        from saelens_matryoshka.report.run import page_content
        from saelens_matryoshka.report.store import stored_with

        sae = load_sae(path, device)
        language_model = None if no_samples else load_language_model_for(sae, model, device)
    found = None
    if not no_samples:
        # beside the page where the model is not in a folder, or in one of somebody else's
        beside = target.with_suffix(".samples")
        place = folder / "samples" if folder.is_dir() else beside
        found = stored_with(place, sae)
        if found is None and obstacle(place):
            place = beside
            found = stored_with(place, sae)
        if found is None:
            with writing_samples(place):
                text, described = load_text(sae, dataset, split, skip, model=model)
                found = obtain_samples(
                    console,
                    place,
                    sae,
                    language_model,
                    text,
                    described,
                    overwrite=False,
                    n_tokens=tokens,
                    n_top=20,
                    n_intervals=8,
                    per_interval=3,
                    before=20,
                    after=20,
                    context_size=context_size,
                    batch_size_prompts=batch_size_prompts,
                    exclude_special_tokens=True,
                    seed=0,
                )
    with console.status("writing the page"):
        content = page_content(
            sae, folder, title or folder.resolve().name, samples=found, model=language_model
        )
        size = write_page(content, target)
    console.print(f"written: {target}, {size / 1e6:.1f} MB", markup=False)
    parts = {"metrics.json": content.evaluation, "metrics.jsonl": content.log}
    left_out = [what for what, part in parts.items() if part is None]
    for what in left_out:
        console.print(f"left out: what {what} would show; there is none", markup=False)
    write_numbers(dumps({"page": str(target), "bytes": size, "left_out": left_out}), json)
