"""`saelens-matryoshka describe`: descriptions of latents by a chat model, with detection scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saelens_matryoshka.cli.inputs import (
    load_language_model_for,
    load_sae,
    load_text,
    pick_device,
    results_folder,
)
from saelens_matryoshka.cli.interruption import interruptible
from saelens_matryoshka.cli.options import Device, Model, Skip, Split, Where
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
from saelens_matryoshka.files.valid_json import dumps

_ENDPOINT = "The chat model"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("describe")(describe)


@interruptible("The latents that are done are kept; the same command asks for the others.")
def describe(
    path: Where,
    chat_model: Annotated[
        str, typer.Option(help="Name of the chat model at the endpoint.", rich_help_panel=_ENDPOINT)
    ],
    base_url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible endpoint. Default: OPENAI_BASE_URL of the environment, else OpenAI.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    key_variable: Annotated[
        str,
        typer.Option(help="Environment variable that holds the endpoint's key.", rich_help_panel=_ENDPOINT),
    ] = "OPENAI_API_KEY",
    n_latents: Annotated[
        int, typer.Option(min=1, help="How many latents, evenly from the levels, at random.")
    ] = 100,
    latents: Annotated[str | None, typer.Option(help="Which latents instead, e.g. 0,5,17.")] = None,
    model: Model = None,
    dataset: Annotated[
        str | None, typer.Option(help="Text to take examples from, as for eval.", rich_help_panel=TEXT)
    ] = None,
    split: Split = "train",
    skip: Skip = 0,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to take examples from.", rich_help_panel=TEXT)
    ] = 1_000_000,
    context_size: Annotated[int, typer.Option(min=2, help="Tokens per prompt.", rich_help_panel=TEXT)] = 128,
    min_firings: Annotated[
        int, typer.Option(min=1, help="Tokens a latent must fire on to be chosen.", rich_help_panel=TEXT)
    ] = 50,
    prices: Annotated[
        str | None,
        typer.Option(
            help="USD per million tokens of prompts and of answers, e.g. 0.15,0.60: adds the cost.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=_ENDPOINT)
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of latents and examples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results. Default: PATH/descriptions.", rich_help_panel=OUTPUT),
    ] = None,
    device: Device = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Say what it will take, and send nothing.", rich_help_panel=_ENDPOINT
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before sending.", rich_help_panel=_ENDPOINT)
    ] = False,
    json: Json = None,
) -> None:
    """Describe latents with a chat model, and score the descriptions.

    The score is detection: whether the model, knowing the description, tells where the latent fires. What it
    will take is said before anything is sent. What is finished is not asked for again: call it again after an
    interruption.

      saelens-matryoshka describe output/transcoder \\
          --chat-model gpt-4o-mini --prices 0.15,0.60
      saelens-matryoshka describe output/transcoder \\
          --chat-model qwen3 --base-url http://localhost:8000/v1
    """
    from saelens_matryoshka.saebench.requirements import require_sae_bench

    require_writable(json)
    console = Console(stderr=on_stdout(json))
    require_sae_bench()
    chosen = _numbers("latents", latents, int) if latents is not None else None
    price = _numbers("prices", prices, float) if prices is not None else None
    if price is not None and len(price) != 2:
        raise ValueError(
            f"--prices {prices!r}: expected two numbers, of prompts and of answers, e.g. 0.15,0.60."
        )
    quieten()
    device = pick_device(device)
    with console.status("loading") as status:
        from saelens_matryoshka.saebench import Endpoint, Estimate, Prices
        from saelens_matryoshka.saebench import describe as describe_latents

        sae = load_sae(path, device)
        folder = results_folder(path, out, "descriptions")
        language_model = load_language_model_for(sae, model, device)
        text, _ = load_text(sae, dataset, split, skip, model=model)
        status.update("collecting examples")

        def approve(needed: Estimate) -> bool:
            status.stop()
            console.print(str(needed) + ".")
            if price is not None:
                console.print(f"At these prices at most {needed.cost(Prices(*price)):.2f} USD.")
            approved = not estimate and (yes or typer.confirm("Send them?", err=True))
            if approved:
                status.start()
            return approved

        said = describe_latents(
            sae,
            language_model,
            text,
            folder,
            endpoint=Endpoint(chat_model, base_url, key_variable),
            n_latents=n_latents,
            latents=chosen,
            n_tokens=tokens,
            context_size=context_size,
            min_firings=min_firings,
            concurrency=concurrency,
            seed=seed,
            approve=approve,
            on_progress=lambda done, all_: status.update(f"{done} of {all_} latents"),
        )
    latents_said = [one.to_dict() for one in said.by_latent.values()]
    write_numbers(dumps({"folder": str(said.folder), "latents": latents_said}), json)
    if said.by_latent and not on_stdout(json):
        console.print(said.table())
        console.print(f"Saved in {said.folder}: latents.jsonl, a line per latent.", markup=False)


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option} {text!r}: expected numbers, separated by commas.") from None
