"""The six evals: their settings, what they need of a prefix, how SAEBench is called, what to show.

The settings are SAEBench's own fields with its own defaults (`core` with those of its leaderboard), so
that figures are comparable with published ones; what the language model, the data or the prefix cannot
fulfil is clipped.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from saelens_matryoshka.saebench.data import LabelledText


@dataclass(frozen=True)
class Eval:
    """One of SAEBench's evals."""

    name: str
    figures: Mapping[str, str]
    """metrics that the table shows, with their headings"""
    min_width: int = 1
    """latents that it needs"""
    clipped: tuple[str, ...] = ()
    """settings that are lists of numbers of latents; those beyond the prefix's width are left out"""
    without_latents: tuple[str, ...] = ()
    """settings that what is computed of the language model alone, and cached, depends on"""
    labelled: bool = False
    """whether it runs on labelled text"""


_PROBING_FIGURES = {
    "sae_top_1_test_accuracy": "accuracy, 1 latent",
    "sae_top_5_test_accuracy": "accuracy, 5 latents",
    "llm_test_accuracy": "accuracy, activation",
}
_PROBE_SETTINGS = (  # of SCR and TPP
    *("dataset_names", "train_set_size", "test_set_size", "context_length", "probe_epochs"),
    *("probe_lr", "probe_l1_penalty", "probe_train_batch_size", "early_stopping_patience"),
)

EVALS: dict[str, Eval] = {
    item.name: item
    for item in (
        Eval(
            "core",
            {
                "ce_loss_score": "CE recovered",
                "kl_div_score": "KL score",
                "explained_variance": "explained variance",
                "saebench_explained_variance": "explained variance (SAEBench's)",
                "frac_alive": "alive latents",
            },
        ),
        Eval(
            "absorption",
            {
                "mean_absorption_fraction_score": "absorption fraction",
                "mean_full_absorption_score": "full absorption",
                "mean_num_split_features": "latents a letter splits into",
            },
            min_width=10,
            without_latents=("prompt_template", "prompt_token_pos"),
        ),
        Eval(
            "sparse_probing",
            _PROBING_FIGURES,
            clipped=("k_values",),
            without_latents=(
                *("dataset_names", "probe_train_set_size", "probe_test_set_size"),
                *("context_length", "k_values"),
            ),
            labelled=True,
        ),
        Eval(
            "sae_probes",
            _PROBING_FIGURES,
            clipped=("ks",),
            without_latents=("setting", "baseline_method"),
        ),
        Eval(
            "scr",
            {
                "scr_metric_threshold_2": "SCR, 2 latents",
                "scr_metric_threshold_10": "SCR, 10 latents",
                "scr_metric_threshold_50": "SCR, 50 latents",
            },
            min_width=2,
            clipped=("n_values",),
            without_latents=(*_PROBE_SETTINGS, "column1_vals_lookup"),
            labelled=True,
        ),
        Eval(
            "tpp",
            {
                "tpp_threshold_2_total_metric": "TPP, 2 latents",
                "tpp_threshold_10_total_metric": "TPP, 10 latents",
                "tpp_threshold_50_total_metric": "TPP, 50 latents",
            },
            min_width=2,
            clipped=("n_values",),
            without_latents=_PROBE_SETTINGS,
            labelled=True,
        ),
    )
}

_CORE = {
    # of SAEBench's leaderboard
    "dataset": "Skylion007/openwebtext",
    "n_eval_reconstruction_batches": 200,
    "n_eval_sparsity_variance_batches": 2000,
    "eval_batch_size_prompts": 16,
    "context_size": 128,
    "exclude_special_tokens_from_reconstruction": True,
}
_OURS = {"model_name", "llm_dtype", "random_seed", "perform_scr", "results_path", "model_cache_path"}


def select(names: Sequence[str]) -> list[Eval]:
    """The evals of these names, in SAEBench's order.

    Raises:
        ValueError: There is no such eval.
    """
    unknown = [name for name in names if name not in EVALS]
    if unknown or not names:
        raise ValueError(f"evals={','.join(names)!r}: expected some of {', '.join(EVALS)}.")
    return [item for name, item in EVALS.items() if name in names]


def settings_of(
    item: Eval,
    model: HookedTransformer,
    given: Mapping[str, Any],
    labelled: LabelledText | None,
    llm_batch_size: int,
) -> dict[str, Any]:
    """SAEBench's settings of one eval, for all prefixes.

    Args:
        item: The eval.
        model: The language model, whose context and tokenizer bound some of them.
        given: Settings in place of the defaults, by SAEBench's names.
        labelled: Local text: its name and sizes then replace those of SAEBench's datasets.
        llm_batch_size: Prompts per forward pass of the language model.

    Raises:
        ValueError: There is no such setting, or the local text is too small for the eval.
    """
    defaults = dict(_CORE) if item.name == "core" else _defaults(_config_class(item.name))
    for name, value in (("llm_batch_size", llm_batch_size), ("eval_batch_size_prompts", llm_batch_size)):
        if name in defaults:
            defaults[name] = value
    unknown = set(given) - set(defaults)
    if unknown:
        raise ValueError(
            f"settings: {item.name} has no setting {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(defaults))}."
        )
    if item.name == "absorption":
        template = given.get("prompt_template", defaults["prompt_template"])
        defaults["prompt_token_pos"] = _word_position(model, template)
    if item.labelled and labelled is not None:
        defaults |= _of_local_text(item, labelled, defaults)
    settings = {**defaults, **given}
    for name in ("context_size", "context_length"):
        if name in settings:
            settings[name] = min(settings[name], model.cfg.n_ctx)
    return settings


def clip(item: Eval, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The settings for a prefix of `width` latents."""
    clipped = {name: [n for n in settings[name] if n <= width] for name in item.clipped}
    return {**settings, **clipped}


def call(
    item: Eval,
    sae: Any,
    name: str,
    settings: Mapping[str, Any],
    *,
    model_name: str,
    seed: int,
    dtype: str,
    device: str,
    cache: Path,
    results: Path,
) -> tuple[Path, dict[str, float | None]] | None:
    """Run SAEBench on one SAE, or view of a transcoder.

    Returns:
        SAEBench's file and its metrics, flat; None if it gave no result.
    """
    results.mkdir(parents=True, exist_ok=True)
    selected = [(name, sae)]
    if item.name == "core":
        found = _module("core").multiple_evals(
            selected_saes=selected,
            # Without both of them SAEBench computes everything and returns an empty list.
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            output_folder=str(results),
            dtype=dtype,
            device=device,
            force_rerun=True,
            **settings,
        )
        metrics = found[0]["metrics"] if found else {}
    else:
        own = {"model_name": model_name, "llm_dtype": dtype, "random_seed": seed}
        arguments: dict[str, Any] = {"force_rerun": True}
        if item.name == "sae_probes":
            own |= {"results_path": str(cache), "model_cache_path": str(cache)}
            del own["llm_dtype"]
        elif item.name in ("scr", "tpp"):
            own["perform_scr"] = item.name == "scr"
        if item.name in ("sparse_probing", "scr", "tpp"):
            arguments["artifacts_path"] = str(cache)
        config = _config_class(item.name)(**settings, **own)
        found = _module(item.name).run_eval(config, selected, device, str(results), **arguments)
        metrics = next(iter(found.values()))["eval_result_metrics"] if found else {}
    files = sorted(results.rglob("*_eval_results.json"))
    if not found or not files:
        return None
    flat = {key: value for group in metrics.values() for key, value in group.items()}
    return files[0], flat


def _module(name: str) -> Any:
    modules = {"sae_probes": "sparse_probing_sae_probes", "scr": "scr_and_tpp", "tpp": "scr_and_tpp"}
    return importlib.import_module(f"sae_bench.evals.{modules.get(name, name)}.main")


def _config_class(name: str) -> Any:
    classes = {
        "absorption": "AbsorptionEvalConfig",
        "sparse_probing": "SparseProbingEvalConfig",
        "sae_probes": "SparseProbingSaeProbesEvalConfig",
    }
    return getattr(_module(name), classes.get(name, "ScrAndTppEvalConfig"))


def _defaults(config_class: Any) -> dict[str, Any]:
    config = config_class()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _OURS and field.name in inspect.signature(config_class).parameters
    }


def _word_position(model: HookedTransformer, template: str) -> int:
    """Position of the word in absorption's prompts, counted from the end."""
    after = template.split("{word}")[-1]
    ids = model.tokenizer(after, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    return -len(ids) - 1


def _of_local_text(item: Eval, labelled: LabelledText, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Name and sizes: SAEBench's sizes, or what the text is enough for."""
    settings: dict[str, Any] = {"dataset_names": [labelled.name]}
    if item.name == "scr":
        if len(labelled.attributes) < 2:
            raise ValueError(
                f"labelled: scr needs a column `attribute` with two values; it has {labelled.attributes}."
            )
        sizes = {split: 4 * labelled.quadrant_size(split) for split in ("train", "test")}
        settings["column1_vals_lookup"] = {labelled.name: labelled.label_pairs()}
    else:
        sizes = {split: 2 * labelled.class_size(split) for split in ("train", "test")}
    for split, size in sizes.items():
        if size < 8:
            raise ValueError(f"labelled: the {split} split is too small for {item.name}.")
        name = f"probe_{split}_set_size" if item.name == "sparse_probing" else f"{split}_set_size"
        settings[name] = min(defaults[name], size)
    return settings
