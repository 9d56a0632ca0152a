"""`saelens-matryoshka samples`: where every latent fires, in the formats of the tools that show it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelens_matryoshka.cli.inputs import (
    load_language_model_for,
    load_sae,
    load_text,
    pick_device,
    results_folder,
)
from saelens_matryoshka.cli.interruption import interruptible, told_to_call_again
from saelens_matryoshka.cli.options import (
    BatchSize,
    ContextSize,
    Dataset,
    Device,
    Model,
    Skip,
    SpecialTokens,
    Split,
    Where,
)
from saelens_matryoshka.cli.output import (
    TEXT,
    Console,
    Json,
    quieten,
    require_writable,
    token_progress,
    write_result,
)
from saelens_matryoshka.files.valid_json import dumps

if TYPE_CHECKING:
    from sae_lens import SAE

    from saelens_matryoshka.report.logits import LogitEffects
    from saelens_matryoshka.report.samples import Samples


class Format(str, Enum):
    """What `--format` takes."""

    json = "json"
    neuronpedia = "neuronpedia"
    circuit_tracer = "circuit-tracer"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("samples")(samples)


@interruptible("What is written is whole; the same command again takes it.")
def samples(
    path: Where,
    format: Annotated[
        list[Format] | None,
        typer.Option(help="A format to write them in, too; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run over.", rich_help_panel=TEXT)] = 1_000_000,
    top: Annotated[int, typer.Option(min=1, help="Strongest examples of each latent, one a prompt.")] = 20,
    intervals: Annotated[
        int, typer.Option(min=2, help="Equal intervals of activation to draw from; a power of two.")
    ] = 8,
    per_interval: Annotated[int, typer.Option(min=1, help="Examples drawn from each.")] = 3,
    context: Annotated[int, typer.Option(min=0, help="Tokens of an example on either side.")] = 20,
    model: Model = None,
    dataset: Dataset = None,
    split: Split = "train",
    skip: Skip = 0,
    context_size: ContextSize = None,
    batch_size_prompts: BatchSize = 8,
    special_tokens: SpecialTokens = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the samples. Default: PATH/samples.")] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Folder of circuit-tracer's feature files, one call per layer. Default: with the samples."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    device: Device = None,
    json: Json = None,
) -> None:
    """Collect where every latent fires: its strongest examples, and random ones of every strength.

    They are of the trained model, BOS and the like left out. Called again with the same settings, it takes
    what is there, and only writes further formats. Called again after Ctrl-C, it goes on.

      saelens-matryoshka samples output/demo-tiny-layer-2 --tokens 200000
      saelens-matryoshka samples output/transcoder --format json \\
        --format neuronpedia
      saelens-matryoshka samples output/layer_8 --format circuit-tracer \\
        --features graphs/features
    """
    require_writable(json)
    console = Console(stderr=True)
    quieten()
    device = pick_device(device)
    folder = results_folder(path, out, "samples")
    with console.status("loading"):
        sae = load_sae(path, device)
        language_model = load_language_model_for(sae, model, device)
    with writing_samples(folder):
        text, described = load_text(sae, dataset, split, skip, model=model)
        found = obtain_samples(
            console,
            folder,
            sae,
            language_model,
            text,
            described,
            overwrite=overwrite,
            n_tokens=tokens,
            n_top=top,
            n_intervals=intervals,
            per_interval=per_interval,
            before=context,
            after=context,
            context_size=context_size,
            batch_size_prompts=batch_size_prompts,
            exclude_special_tokens=not special_tokens,
            seed=seed,
        )
        written = [str(folder)]
        for chosen in dict.fromkeys(format or []):
            with console.status(f"writing {chosen.value}"):
                written.append(
                    str(_write_format(chosen, found, sae, language_model, path, folder, features, overwrite))
                )
    _show(found, written, json)


def writing_samples(folder: Path) -> AbstractContextManager[None]:
    """Within, a folder of samples, and what is kept beside it, are this process's alone.

    Raises:
        ValueError: another process is at it.
    """
    from saelens_matryoshka.files.locks import alone_at

    in_use = ValueError(
        f"{str(folder)!r} is in use: another process is writing samples there. Wait for it, or stop it. "
        "(`samples --out` takes another folder.)"
    )
    return alone_at(folder, in_use)


def obtain_samples(
    console: Console,
    folder: Path,
    sae: SAE[Any],
    language_model: Any,
    text: Any,
    described: str,
    *,
    overwrite: bool,
    **settings: Any,
) -> Samples:
    """The samples stored in a folder, if of these settings; else they are collected and stored there.

    Called within `writing_samples`.

    Args:
        console: For the progress bar.
        folder: Where they are, or will be.
        sae: What to sample.
        language_model: Its language model.
        text: To sample on.
        described: In words, which text that is.
        overwrite: Replace what is there.
        settings: Of `collect_samples`.

    Raises:
        ValueError: the folder holds something else.
        typer.Exit: it was interrupted, and what the user can do has been said.
    """
    import torch

    from saelens_matryoshka.files.atomic import whole_folder
    from saelens_matryoshka.files.fingerprint import hash_of_weights
    from saelens_matryoshka.files.unfinished import Unfinished
    from saelens_matryoshka.report.collect import collect_samples
    from saelens_matryoshka.report.store import stored_samples

    batch_size = settings.pop("batch_size_prompts")
    key = {**settings, "text": described, "weights": hash_of_weights(sae)}
    if not overwrite and (found := stored_samples(folder, key)) is not None:
        console.print(f"samples are there: {folder}", markup=False)
        return found
    depends_on = {
        **key,
        "batch_size_prompts": batch_size,
        "model": getattr(getattr(language_model, "cfg", None), "model_name", None),
        "device": torch.device(sae.device).type,
    }
    unfinished = Unfinished(folder, depends_on)
    if said := unfinished.found():
        console.print(said, markup=False, soft_wrap=True)
    started = time.monotonic()
    with told_to_call_again(), token_progress(console) as progress:
        found = collect_samples(
            sae,
            language_model,
            text,
            **settings,
            batch_size_prompts=batch_size,
            on_progress=lambda done: progress("samples", done, settings["n_tokens"]),
            unfinished=unfinished,
        )
    seconds = round(unfinished.seconds + time.monotonic() - started, 1)
    found.about = {"settings": key, "text": described, "seconds": seconds}
    with whole_folder(folder, overwrite=overwrite) as new:
        found.save(new)
    unfinished.remove()
    return found


def _write_format(
    chosen: Format,
    found: Samples,
    sae: SAE[Any],
    language_model: Any,
    path: str,
    folder: Path,
    features: Path | None,
    overwrite: bool,
) -> Path:
    from saelens_matryoshka.files.atomic import whole_folder
    from saelens_matryoshka.report.feature_files import require_new_layer, write_feature_files
    from saelens_matryoshka.report.neuronpedia import write_neuronpedia
    from saelens_matryoshka.report.seed_files import write_seed_files
    from saelens_matryoshka.report.text import TokenText

    name = Path(path.replace(":", "/")).name
    text = TokenText(getattr(language_model, "tokenizer", None))
    if chosen is Format.circuit_tracer and features is not None:  # with the layers that are there
        layer = _layer(sae)
        require_new_layer(features, layer)
        logits = _logits(sae, language_model)
        write_feature_files(found, text, features, layer=layer, transcoder_id=name, logits=logits)
        return features
    target = folder / chosen.value
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: give --overwrite to replace it.")
    with whole_folder(target, overwrite=overwrite) as new:
        if chosen is Format.json:
            write_seed_files(found, text, new)
            return target
        layer, logits = _layer(sae), _logits(sae, language_model)
        if chosen is Format.neuronpedia:
            write_neuronpedia(found, text, new, sae=sae, logits=logits, sae_set=name, layer=layer)
        else:
            write_feature_files(found, text, new / "features", layer=layer, transcoder_id=name, logits=logits)
    return target


def _logits(sae: SAE[Any], language_model: Any) -> LogitEffects | None:
    """None where what it writes to has none: the formats allow for that."""
    from saelens_matryoshka.report.logits import logit_effects

    try:
        return logit_effects(sae, language_model)
    except ValueError:
        return None


def _layer(sae: SAE[Any]) -> int:
    from sae_lens.util import extract_layer_from_tlens_hook_name

    hook = sae.cfg.metadata.hook_name
    layer = extract_layer_from_tlens_hook_name(hook)
    if layer is None:
        raise ValueError(f"hook_name={hook!r} does not say of which layer it is, which this format needs.")
    return layer


def _show(found: Samples, written: list[str], json: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    fired = int((found.fired > 0).sum())
    summary = {
        "n_tokens": found.n_tokens,
        "n_latents": found.d_sae,
        "n_fired": fired,
        "n_examples": int((found.top.positions >= 0).sum() + (found.intervals.positions >= 0).sum()),
        "seconds": found.about["seconds"],
        "written": written,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("tokens", f"{found.n_tokens:,}, in {found.about['seconds']:,} s")
    table.add_row("latents", f"{found.d_sae:,}, of which {fired:,} fired")
    table.add_row("examples", f"{summary['n_examples']:,}")
    for place in written:
        table.add_row("written", Text(place))
    write_result(table, dumps(summary, indent=2), found.about["text"], json)
