"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from saelens_matryoshka.cli.output import TEXT

Where = Annotated[str, typer.Argument(help="A folder saved by SAELens, or RELEASE:SAE_ID.")]
Model = Annotated[str | None, typer.Option(help="Language model. Default: the one it was trained on.")]
Dataset = Annotated[str | None, typer.Option(help="Text, as for eval.", rich_help_panel=TEXT)]
Split = Annotated[str, typer.Option(help="Split of the dataset.", rich_help_panel=TEXT)]
Skip = Annotated[int, typer.Option(min=0, help="Documents to leave out at its start.", rich_help_panel=TEXT)]
ContextSize = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per prompt. Default: that of the training.", rich_help_panel=TEXT),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.", rich_help_panel=TEXT)]
SpecialTokens = Annotated[
    bool, typer.Option("--special-tokens", help="Count BOS, EOS and padding too.", rich_help_panel=TEXT)
]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one.")]
