"""`saelens-matryoshka eval` and `compare`: the metrics of every prefix, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelens_matryoshka.cli.inputs import (
    folder_name,
    load_language_model_for,
    load_sae,
    load_saes,
    load_text,
    pick_device,
)
from saelens_matryoshka.cli.interruption import interruptible, told_to_call_again
from saelens_matryoshka.cli.options import BatchSize, ContextSize, Device, Skip, SpecialTokens, Split, Where
from saelens_matryoshka.cli.output import (
    OUTPUT,
    TEXT,
    Console,
    Json,
    quieten,
    require_writable,
    token_progress,
    write_result,
)

if TYPE_CHECKING:
    from sae_lens import SAE

    from saelens_matryoshka.files.unfinished import Unfinished

Model = Annotated[
    str | None,
    typer.Option(help='Language model, "tiny" for the embedded one. Default: the one it was trained on.'),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Held-out text: a dataset of the hub, a folder, or a .txt, .jsonl, .parquet or .csv file.",
        rich_help_panel=TEXT,
    ),
]
Tokens = Annotated[
    int, typer.Option(min=1, help="Tokens for all metrics but cross-entropy and KL.", rich_help_panel=TEXT)
]
CeTokens = Annotated[
    int, typer.Option(min=0, help="Tokens for cross-entropy and KL; 0 leaves them out.", rich_help_panel=TEXT)
]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Draw FVU and CE recovered against width and L0: a .png, .svg, .pdf or .html.",
        rich_help_panel=OUTPUT,
    ),
]
TableFile = Annotated[
    Path | None,
    typer.Option("--table", help="Write the numbers as a table too: a .md or .csv.", rich_help_panel=OUTPUT),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("eval")(evaluate)
    app.command("compare")(compare)


@interruptible("Call it again: it goes on from what was kept last, if anything was.")
def evaluate(
    path: Where,
    model: Model = None,
    dataset: Dataset = None,
    split: Split = "train",
    skip: Skip = 0,
    tokens: Tokens = 100_000,
    ce_tokens: CeTokens = 20_000,
    context_size: ContextSize = None,
    batch_size_prompts: BatchSize = 8,
    special_tokens: SpecialTokens = False,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
    table: TableFile = None,
) -> None:
    """Evaluate every prefix: FVU, L0, dead latents, CE recovered, KL.

    Called again after Ctrl-C, it goes on.

      saelens-matryoshka eval results/tiny/mlp-2/first
      saelens-matryoshka eval results/tiny/mlp-2/first --plot prefixes.png
      saelens-matryoshka eval gpt2-small-res-jb:blocks.8.hook_resid_pre \\
          --dataset NeelNanda/pile-10k
    """
    console = Console(stderr=True)
    require_writable(json)
    quieten()
    _require_writable(plot, table)
    device = pick_device(device)
    with console.status("loading"):
        import saelens_matryoshka as sm

        sae = load_sae(path, device)
        language_model = load_language_model_for(sae, model, device)
        text, described = load_text(sae, dataset, split, skip, model=model)
        settings: dict[str, Any] = {
            "n_tokens": tokens,
            "n_ce_tokens": ce_tokens,
            "context_size": context_size,
            "batch_size_prompts": batch_size_prompts,
            "exclude_special_tokens": not special_tokens,
        }
        unfinished = _unfinished("eval", {path: sae}, language_model, {**settings, "text": described})
    with _going_on(unfinished, console) as on_progress:
        result = sm.evaluate(
            sae, language_model, text, **settings, on_progress=on_progress, unfinished=unfinished
        )
    write_result(result.table(), result.to_json(), described, json)
    _write({folder_name(path): result}, plot, table, console)
    unfinished.remove()


@interruptible("Call it again: it goes on from what was kept last, if anything was.")
def compare(
    paths: Annotated[list[str], typer.Argument(help="Folders saved by SAELens, or RELEASE:SAE_ID.")],
    model: Model = None,
    dataset: Dataset = None,
    split: Split = "train",
    skip: Skip = 0,
    tokens: Tokens = 100_000,
    ce_tokens: CeTokens = 20_000,
    context_size: ContextSize = None,
    batch_size_prompts: BatchSize = 8,
    special_tokens: SpecialTokens = False,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
    table: TableFile = None,
) -> None:
    """Evaluate several models of one target on the same tokens.

    Each is measured in its own frame: what they read may differ, what they predict may not. Called again
    after Ctrl-C, it goes on.

      saelens-matryoshka compare output/a output/b --plot both.png
      saelens-matryoshka compare output/a \\
          gemma-scope-2b-pt-transcoders:layer_8/width_16k/average_l0_61 \\
          --dataset NeelNanda/pile-10k --table both.csv
    """
    console = Console(stderr=True)
    require_writable(json)
    quieten()
    _require_writable(plot, table)
    device = pick_device(device)
    with console.status("loading"):
        import saelens_matryoshka as sm

        saes = load_saes(paths, device)
        first = next(iter(saes.values()))
        _require_one_language_model(saes, model)
        language_model = load_language_model_for(first, model, device)
        text, described = load_text(first, dataset, split, skip, model=model)
        settings: dict[str, Any] = {
            "n_tokens": tokens,
            "n_ce_tokens": ce_tokens,
            "context_size": context_size,
            "batch_size_prompts": batch_size_prompts,
            "exclude_special_tokens": not special_tokens,
        }
        models = dict(zip(paths, saes.values(), strict=True))
        unfinished = _unfinished("compare", models, language_model, {**settings, "text": described})
    with _going_on(unfinished, console) as on_progress:
        result = sm.compare(
            saes, language_model, text, **settings, on_progress=on_progress, unfinished=unfinished
        )
    write_result(result.tables(), result.to_json(), described, json)
    _write(result.results, plot, table, console)
    unfinished.remove()


def _unfinished(
    command: str, saes: dict[str, SAE[Any]], language_model: Any, settings: dict[str, Any]
) -> Unfinished:
    """Where the state of an evaluation is kept: a published model has no folder to keep it beside."""
    import torch

    from saelens_matryoshka.files.fingerprint import hash_of, hash_of_model, hash_of_weights
    from saelens_matryoshka.files.unfinished import Unfinished

    depends_on = {
        **settings,
        "weights": [hash_of_weights(sae) for sae in saes.values()],
        "config": [hash_of({**sae.cfg.to_dict(), "device": None}) for sae in saes.values()],
        "model": getattr(getattr(language_model, "cfg", None), "model_name", None),
        "model_weights": hash_of_model(language_model),
        "device": [torch.device(sae.device).type for sae in saes.values()],
    }
    places = [str(Path(path).resolve()) if Path(path).exists() else path for path in saes]
    return Unfinished.in_cache(command, places, depends_on)


@contextmanager
def _going_on(unfinished: Unfinished, console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Around an evaluation: what was kept of it is told, and so is how to go on if it is interrupted."""
    if said := unfinished.found():
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    with told_to_call_again(), token_progress(console) as on_progress:
        yield on_progress


def _require_writable(plot: Path | None, table: Path | None) -> None:
    """Refuse what could not be written before the evaluation, not after it."""
    if plot is not None:
        from saelens_matryoshka.evaluation.plots import require_plotting

        require_plotting(plot)
        require_writable(plot, "--plot")
    if table is not None:
        from saelens_matryoshka.evaluation.tables import require_table

        require_table(table)
        require_writable(table, "--table")


def _write(results: dict[str, Any], plot: Path | None, table: Path | None, console: Console) -> None:
    if plot is not None:
        from saelens_matryoshka.evaluation.plots import plot as draw_plot

        draw_plot(results, plot)
    if table is not None:
        from saelens_matryoshka.evaluation.tables import write_table

        write_table(results, table)
    for written in filter(None, (plot, table)):
        console.print(f"written: {written}", markup=False)


def _require_one_language_model(saes: dict[str, Any], model: str | None) -> None:
    if model is not None:
        return
    names = {name: sae.cfg.metadata.model_name for name, sae in saes.items()}
    if len(set(names.values())) > 1:
        said = "; ".join(f"{name} reads {of!r}" for name, of in names.items())
        raise ValueError(f"model_name differs ({said}). If they are the same model, name it with --model.")
