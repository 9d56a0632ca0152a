"""`saelens-matryoshka train`: SAELens's own command line, with our architectures in it."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "train",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
        help="Train with SAELens's runner and flags (--help lists them all), e.g. "
        "--architecture matryoshka_transcoder --model_name gpt2 "
        "--hook_name blocks.8.ln2.hook_normalized --hook_name_out blocks.8.hook_mlp_out ...",
    )(train)


def train(context: typer.Context) -> None:
    """Parse SAELens's flags and run its runner."""
    from sae_lens import LanguageModelSAETrainingRunner

    from saelens_matryoshka.runner import require_own_output_path
    from saelens_matryoshka.seams import parse_runner_config

    cfg = parse_runner_config(context.args)
    require_own_output_path(cfg)
    LanguageModelSAETrainingRunner(cfg).run()
