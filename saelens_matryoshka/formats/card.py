"""The model card of what is exported, written from the models' metadata and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saelens_matryoshka.formats.export import Model

_FRAMES = {
    "normalized": "the norm's output before its gain (in a model loaded without folding its norms)",
    "normalized_folded": "the norm's output, in a model loaded with its norms folded",
    "raw": "the hook's tensor as it is",
}
_LIBRARIES = {"saelens": "saelens", "sparsify": "sparsify", "circuit-tracer": "circuit-tracer"}


def write_card(
    folder: Path,
    format: str,
    sets: Sequence[tuple[str, Sequence[Model]]],
    repo_id: str | None,
    *,
    several: bool,
) -> None:
    """Write README.md, the card of the hub.

    Args:
        folder: Where the sets are.
        format: The format they are in.
        sets: Sub-folder ("" for the folder itself) and models of each set.
        repo_id: Where they will be found; None: not known.
        several: Whether each model of a set has a folder of its own.
    """
    # Every set has prefixes of the same models: the widest says most of them.
    widest = max(sets, key=lambda one: one[1][0].coder.d_sae)
    first = widest[1][0].coder
    flat = format == "saelens" and not several
    kind = "Transcoders" if first.is_transcoder else "SAEs"
    if any(len(model.coder.widths) > 1 for _, models in sets for model in models):
        kind = f"Matryoshka {kind[0].lower() + kind[1:] if kind == 'Transcoders' else kind}"
    model_name = first.metadata.get("model_name") or "a language model"
    lines = [
        *_front_matter(format, first.metadata.get("model_name")),
        "",
        f"# {kind} of {model_name}",
        "",
        f"In the format of {format}, written by saelens-matryoshka.",
        "",
        "## What",
        "",
        "| folder | reads | predicts | latents | nested widths | activation |",
        "|---|---|---|---:|---|---|",
        *(
            _row(name if flat else _join(name, model.name), model)
            for name, models in sets
            for model in models
        ),
        "",
        *_frames(sets),
        *_metrics(widest[1]),
        "## How to load",
        "",
        *_how_to_load(format, widest, repo_id or "user/repo", str(model_name), flat=flat),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _front_matter(format: str, model_name: Any) -> list[str]:
    lines = ["---", f"library_name: {_LIBRARIES.get(format, 'saelens')}"]
    lines += ["tags:", "- sparse-autoencoder", "- interpretability", "- matryoshka"]
    if isinstance(model_name, str) and model_name.count("/") == 1:
        lines.append(f"base_model: {model_name}")
    return [*lines, "---"]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _row(where: str, model: Model) -> str:
    coder = model.coder
    metadata = coder.metadata
    source, latents = metadata.get("hook_name"), f"{coder.d_sae:,}"
    widths = ", ".join(f"{width:,}" for width in coder.widths) if len(coder.widths) > 1 else "-"
    activation = {"relu": "ReLU", "jumprelu": "JumpReLU", "topk": f"TopK, k = {coder.k}"}[coder.activation]
    if coder.W_skip is not None:
        activation += ", with a linear skip"
    target = metadata.get("hook_name_out") or source
    return f"| {where or '.'} | `{source}` | `{target}` | {latents} | {widths} | {activation} |"


def _frames(sets: Sequence[tuple[str, Sequence[Model]]]) -> list[str]:
    metadata = [model.coder.metadata for _, models in sets for model in models]
    frames = sorted({str(m["input_frame"]) for m in metadata if m.get("input_frame") in _FRAMES})
    lines = [f"What is read is {_FRAMES[frame]}." for frame in frames]
    notes = sorted({str(m["inference_activation"]) for m in metadata if m.get("inference_activation")})
    lines += [f"Activation: {note}." for note in notes]
    datasets = sorted({str(m["dataset_path"]) for m in metadata if m.get("dataset_path")})
    if datasets:
        lines.append(f"Trained on {', '.join(datasets)}.")
    return [*lines, ""] if lines else []


def _metrics(models: Sequence[Model]) -> list[str]:
    evaluated = [model for model in models if model.evaluation]
    if not evaluated:
        return []
    lines = ["## Metrics", ""]
    lines += [
        "| | prefix | FVU | L0 | dead | CE recovered (zero abl.) | KL |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    tokens = set()
    for model in evaluated:
        assert model.evaluation is not None
        n_tokens = model.evaluation.get("n_tokens")
        if isinstance(n_tokens, int):
            tokens.add(n_tokens)
        for row in model.evaluation.get("prefixes", []):
            cells = [
                f"{row['width']:,}",
                _number(row.get("fvu"), ".3f"),
                _number(row.get("l0"), ".1f"),
                _number(row.get("dead_fraction"), ".1%"),
                _number(row.get("ce_recovered"), ".1%"),
                _number(row.get("kl"), ".3f"),
            ]
            lines.append(f"| {model.name} | {' | '.join(cells)} |")
    counts = ", ".join(f"{count:,}" for count in sorted(tokens))
    lines += [
        "",
        f"Each row is a prefix, the first latents of the model on their own, on {counts} tokens.",
    ]
    lines += ["FVU is Σ‖y - ŷ‖² / Σ‖y - ȳ‖²: predicting the mean scores 1.", ""]
    return lines


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if isinstance(value, int | float) and abs(value) < 1e12 else "-"


def _how_to_load(
    format: str, shown: tuple[str, Sequence[Model]], repo_id: str, model_name: str, *, flat: bool
) -> list[str]:
    name, models = shown
    if format == "circuit-tracer":
        reference = _join(repo_id, name)
        code = [
            "from circuit_tracer import ReplacementModel, attribute",
            "",
            f'model = ReplacementModel.from_pretrained("{model_name}", "{reference}")',
            'graph = attribute("The capital of France is", model)',
        ]
    elif format == "sparsify":
        from saelens_matryoshka.formats.sparsify import hookpoint_of

        hookpoint = _join(name, hookpoint_of(models[0].coder))
        code = [
            "from sparsify import SparseCoder",
            "",
            f'coder = SparseCoder.load_from_hub("{repo_id}", hookpoint="{hookpoint}")',
        ]
    elif format == "dictionary-learning":
        code = [
            "from dictionary_learning.utils import load_dictionary",
            "from huggingface_hub import snapshot_download",
            "",
            f'folder = snapshot_download("{repo_id}")' + (f' + "/{name}"' if name else ""),
            'dictionary, config = load_dictionary(folder, device="cpu")',
        ]
    else:
        inside = name if flat else _join(name, models[0].name)
        # The hub's SAELens repositories keep every model in a folder of its own.
        call = f'from_pretrained("{repo_id}", "{inside}")' if inside else 'load_from_disk(".")  # this folder'
        code = ["from sae_lens import SAE", "", f"sae = SAE.{call}"]
    return ["```python", *code, "```"]
