"""What a page needs of a run, from its folder and its weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sae_lens import SAE

from saelens_matryoshka.evaluation.evaluator import trained_k
from saelens_matryoshka.files.plain_yaml import plain_values
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths
from saelens_matryoshka.report.decoder import decoder_relations
from saelens_matryoshka.report.logits import logit_effects
from saelens_matryoshka.report.metrics_files import read_log
from saelens_matryoshka.report.page import PageContent
from saelens_matryoshka.report.samples import Samples
from saelens_matryoshka.report.text import TokenText
from saelens_matryoshka.runs.folder import RunFolder
from saelens_matryoshka.runs.recorded import read_evaluation

_KINDS = {
    "matryoshka_sae": "Matryoshka SAE",
    "matryoshka_batchtopk": "Matryoshka SAE",
    "matryoshka_transcoder": "Matryoshka transcoder",
    "matryoshka_skip_transcoder": "Matryoshka skip transcoder",
}

_SCALAR = (str, int, float)
_SHOWN = {
    "k": "k in training",
    "training_tokens": "training tokens",
    "train_batch_size_tokens": "tokens per batch",
    "lr": "learning rate, at its highest",
    "lr_warm_up_steps": "warm-up steps",
    "lr_decay_steps": "decay steps",
    "dead_feature_window": "dead after steps without firing",
    "seed": "seed",
    "started_at": "started at",
    "completed_at": "completed at",
}
"""settings on the page, and what they are called there"""


def page_content(
    sae: SAE[Any], folder: Path, name: str, *, samples: Samples | None = None, model: Any = None
) -> PageContent:
    """Gather what the page of a run shows.

    Args:
        sae: The run's SAE or transcoder.
        folder: The run's folder, for its log, evaluation and settings, each if it is there.
        name: What the page is called.
        samples: Of its latents.
        model: Its language model, needed with the samples.

    Raises:
        ValueError: a file in the folder is not what its name says.
    """
    sae = inference_model(sae)
    metadata, widths, run = sae.cfg.metadata, matryoshka_widths(sae), RunFolder(folder)
    trained_as = metadata.get("training_architecture")
    architecture = sae.cfg.architecture()
    content = PageContent(
        title=name,
        kind=f"{_KINDS.get(trained_as or '', architecture)} of {metadata.model_name or 'a language model'}",
        source=metadata.hook_name or "",
        target=metadata.hook_name_out or metadata.hook_name or "",
        widths=widths,
        relations=decoder_relations(sae.W_dec.detach(), widths),
        evaluation=read_evaluation(folder),
        log=read_log(run.metrics_log),
        samples=samples,
        k=trained_k(sae),
        folder=str(folder),
    )
    if content.evaluation is not None and content.evaluation["prefixes"][-1]["width"] != sae.cfg.d_sae:
        raise ValueError(
            f"{folder}: its evaluation is of {content.evaluation['prefixes'][-1]['width']} latents, and the "
            f"model has {sae.cfg.d_sae}: evaluate it again."
        )
    if samples is not None:
        content.text = TokenText(getattr(model, "tokenizer", None))
        try:
            content.logits = logit_effects(sae, model)
        except ValueError as error:
            content.no_logits = f"None: {error}"
    content.facts = _facts(sae, architecture, trained_as, widths, run)
    return content


def _facts(
    sae: SAE[Any], architecture: str, trained_as: str | None, widths: list[int], run: RunFolder
) -> dict[str, str]:
    metadata = sae.cfg.metadata
    facts = {
        "language model": metadata.model_name,
        "reads": metadata.hook_name,
        "predicts": metadata.hook_name_out,
        "frame of what it reads": metadata.input_frame,
        "saved as": architecture,
        "trained as": trained_as,
        "dimensions": f"{sae.cfg.d_in} to {sae.W_dec.shape[-1]}",
        "widths": ", ".join(f"{width:,}" for width in widths),
        "tokens per prompt": metadata.context_size,
        "training text": metadata.dataset_path,
        "SAELens": metadata.sae_lens_training_version,
    }
    facts |= _settings(run.config)
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _settings(path: Path) -> dict[str, Any]:
    """What a reader asks for first of its settings, the command that began it, and when it ran."""
    if not path.is_file():
        return {}
    try:
        settings = plain_values(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no YAML: {error}.") from None
    if not isinstance(settings, dict):
        return {}
    found = {
        name: _said(settings[key]) for key, name in _SHOWN.items() if isinstance(settings.get(key), _SCALAR)
    }
    command = settings.get("command")
    if isinstance(command, list) and command:
        found["command"] = shlex.join(["saelens-matryoshka", *map(str, command)])
    return found


def _said(value: str | int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else value
