"""`saelens-matryoshka demo`: train, evaluate, save and reload a nested transcoder, from one command."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from saelens_matryoshka.cli.inputs import TINY, load_language_model, open_dataset, pick_device
from saelens_matryoshka.cli.options import Device
from saelens_matryoshka.cli.output import Console, Json, on_stdout, quieten, require_writable, write_numbers
from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.files.valid_json import dumps

_TINY = "the embedded tiny model"
_CONTEXT_SIZE = 256
_HELD_OUT_DOCUMENTS = 500


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("demo")(demo)


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A model TransformerLens knows, e.g. gpt2. Default: the embedded tiny one."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Default: the middle one.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents. Default: 8 per input dimension.")] = None,
    k: Annotated[float, typer.Option(help="Active latents per token.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens.")] = 400_000,
    lr: Annotated[float | None, typer.Option(help="Default: the recommended one.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to save. Default: output/demo-MODEL-layer-LAYER.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Text to train on: a dataset of the hub, a folder, or a .txt, .jsonl, .parquet or .csv "
            "file; its first 500 documents are held out. Default: the Python standard library's sources, "
            "by file."
        ),
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the initialisation and the shuffling.")] = 0,
    json: Json = None,
) -> None:
    """Train and evaluate a small transcoder, offline by default.

    SAELens's stock runner trains a four-level Matryoshka transcoder of one MLP. Every prefix is evaluated on
    held-out text, with the model as stock SAELens loads it from disk.

      saelens-matryoshka demo
      saelens-matryoshka demo --model gpt2 --layer 8
    """
    require_writable(json)
    console = Console(stderr=on_stdout(json))
    quieten()
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr:g} must be a number above 0.")
    with console.status("loading"):
        import torch
        from sae_lens import SAE, LanguageModelSAETrainingRunner

        import saelens_matryoshka as sm
        from saelens_matryoshka.runner import require_own_output_path

        device = pick_device(device)
        language_model = load_language_model(model or TINY, device)
        layer = language_model.cfg.n_layers // 2 if layer is None else layer
        assert layer is not None
        cfg = _runner_config(language_model, model, layer, d_sae, k, tokens, lr, out, dataset, device, seed)
        require_own_output_path(cfg)
        train_set, held_out = _text(dataset)
    torch.manual_seed(seed)
    console.print(
        f"[bold]Training[/] a Matryoshka transcoder of layer {layer} of {model or _TINY}\n"
        f"  {cfg.hook_name} → {cfg.sae.hook_name_out}\n"
        f"  prefixes of {', '.join(f'{w:,}' for w in cfg.sae.matryoshka_widths)} latents, "
        f"k = {k:g}, {tokens:,} tokens",
    )
    started = time.monotonic()
    runner = LanguageModelSAETrainingRunner(cfg, override_model=language_model, override_dataset=train_set)
    runner.run()
    trained = time.monotonic()
    with console.status("evaluating every prefix on held-out text"):
        sae = SAE.load_from_disk(cfg.output_path, device=device)
        result = sm.evaluate(sae, language_model, held_out, n_tokens=50_000, n_ce_tokens=10_000)
        write_atomically(Path(cfg.output_path) / "evaluation.json", result.to_json() + "\n")
    write_numbers(dumps({"folder": cfg.output_path, "metrics": result.to_dict()}), json)
    if on_stdout(json):
        return
    console.print(result.table())
    console.print("text: held out of the training data")
    console.print(
        f"Trained in {trained - started:.0f} s, evaluated in {time.monotonic() - trained:.0f} s.\n\n"
        f"Saved in {cfg.output_path}: a stock {type(sae).__name__}, evaluation.json and the settings.\n"
        "It loads where this package is not installed:\n"
        f"  from sae_lens import SAE\n"
        f'  transcoder = SAE.load_from_disk("{cfg.output_path}")\n\n'
        "A page of its levels and latents:",
        markup=False,
    )
    report = f"saelens-matryoshka report {shlex.quote(cfg.output_path)}"
    console.print(f"  {report}", markup=False, soft_wrap=True)  # to be pasted


def _runner_config(
    language_model: Any,
    model: str | None,
    layer: int,
    d_sae: int | None,
    k: float,
    tokens: int,
    lr: float | None,
    out: Path | None,
    dataset: str | None,
    device: str,
    seed: int,
) -> Any:
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

    import saelens_matryoshka as sm

    source = sm.find_site(language_model, layer, "mlp_in")
    target = sm.find_site(language_model, layer, "mlp_out")
    d_in = language_model.cfg.d_model
    n_latents: int = 8 * d_in if d_sae is None else d_sae
    sae = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=d_in,
        d_sae=n_latents,
        k=k,
        hook_name_out=target.hook_name,
        input_gain="none" if source.gain is None else "norm_weight",
    )
    size = {"training_tokens": tokens, "train_batch_size_tokens": 1024}
    recommended = sm.recommended_runner_fields(sae, **size)
    name = (model or "tiny").replace("/", "-")
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=model or "saelens_matryoshka.tiny",
        hook_name=source.hook_name,
        dataset_path=dataset or "the Python standard library",
        is_dataset_tokenized=False,
        context_size=min(_CONTEXT_SIZE, language_model.cfg.n_ctx),
        exclude_special_tokens=True,
        **size,
        store_batch_size_prompts=8,
        n_batches_in_buffer=32,
        **{**recommended, "lr": recommended["lr"] if lr is None else lr},
        device=device,
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(out or Path("output") / f"demo-{name}-layer-{layer}"),
        verbose=False,
    )


def _text(dataset: str | None) -> tuple[Any, Any]:
    """Text to train on and held-out text."""
    if dataset is None:
        from saelens_matryoshka.tiny import text

        return text.dataset("train"), text.dataset("held_out")
    documents = open_dataset(dataset, "train")
    left = documents.skip(_HELD_OUT_DOCUMENTS)
    if next(iter(left), None) is None:
        raise ValueError(
            f"--dataset {dataset!r} has no more than the {_HELD_OUT_DOCUMENTS} documents that are held out."
        )
    return left, documents.take(_HELD_OUT_DOCUMENTS)
