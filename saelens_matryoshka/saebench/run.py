"""Run SAEBench on every prefix of a nested SAE or transcoder.

Each prefix becomes a stock model of its own, and SAEBench runs on it alone (`single`). What a run has
finished is kept: a second one with the same settings reads it instead of evaluating again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from sae_lens import SAE
from transformer_lens import HookedTransformer

from saelens_matryoshka.evaluation.evaluator import hooks_and_frame
from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths
from saelens_matryoshka.saebench import evals as _evals
from saelens_matryoshka.saebench.data import LabelledText, running_text
from saelens_matryoshka.saebench.process import scratch_folder
from saelens_matryoshka.saebench.requirements import require_sae_bench
from saelens_matryoshka.saebench.result import PrefixEval, SAEBenchResult
from saelens_matryoshka.saebench.single import Bench
from saelens_matryoshka.saebench.views import layer_of


class SAEBenchError(RuntimeError):
    """SAEBench gave no result for some evals; those it gave are in `result` and on disk."""

    def __init__(self, message: str, result: SAEBenchResult) -> None:
        super().__init__(message)
        self.result = result


def run(
    sae: SAE[Any],
    model: HookedTransformer,
    out: str | Path,
    *,
    evals: Sequence[str] = tuple(_evals.EVALS),
    prefixes: Sequence[int] | str = "auto",
    text: Dataset | str | Path | None = None,
    labelled: LabelledText | DatasetDict | str | Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 42,
    llm_batch_size: int = 32,
    cache: str | Path | None = None,
    overwrite: bool = False,
    on_start: Callable[[str, int], None] | None = None,
) -> SAEBenchResult:
    """Evaluate prefixes with SAEBench.

    Args:
        sae: SAE or transcoder, ours or stock. A training object is converted to the inference model it
            would be saved as; it is not changed.
        model: The language model, as the SAE was trained on it.
        out: Folder of the results: `width-W/EVAL.json` (ours), `width-W/EVAL.saebench.json` (SAEBench's
            own), `width-W/EVAL.log`, and `results.json`: this call's results, and those of other evals and
            prefixes that earlier calls left there of the same SAE, language model and seed.
        evals: Some of core, absorption, sparse_probing, sae_probes, scr, tpp.
        prefixes: Widths, or "auto": the widths the SAE was trained with.
        text: Running text for `core`: a dataset with a column `text`, a local file or folder, or a
            dataset's name on the hub. None: SAEBench's own.
        labelled: Texts for `sparse_probing`, `scr` and `tpp`: a DatasetDict, or a folder with train and
            test files, of rows with `text`, `label` and, for `scr`, `attribute`. None: SAEBench's own.
        settings: SAEBench's settings by eval, where they are not to be its defaults.
        seed: Of SAEBench's probes and samples.
        llm_batch_size: Prompts per forward pass of the language model.
        cache: Folder for activations and probes of the language model, which other runs on the same hook
            then use again. They are keyed by the model's weights, hooks, data and settings, and can take
            tens of gigabytes. None: a folder in `out`, removed in the end.
        overwrite: Evaluate again what `out` has, and replace what was evaluated with other settings.
        on_start: Called with an eval's name and a width before they are evaluated.

    Returns:
        The results of every eval and prefix.

    Raises:
        ImportError: SAEBench is not installed.
        ValueError: An argument is not possible, or `out` has results that were made otherwise.
        SAEBenchError: SAEBench gave no result for some of the evals; all others have been run.
    """
    require_sae_bench()
    out = Path(out).resolve()
    selected = _evals.select(evals)
    sae = inference_model(sae)
    widths = _widths(sae, prefixes)
    _check_model(sae, model)
    given = {name: dict(options) for name, options in (settings or {}).items()}
    if unknown := set(given) - set(_evals.EVALS):
        raise ValueError(f"settings: {', '.join(sorted(unknown))}: expected {', '.join(_evals.EVALS)}.")
    local = None if labelled is None else LabelledText.load(labelled)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_folder(out) as scratch:
            if text is not None:
                given.setdefault("core", {})["dataset"] = running_text(text, scratch / "text")
            bench = Bench(
                sae,
                model,
                out,
                scratch=scratch,
                cache=scratch / "cache" if cache is None else Path(cache).resolve(),
                labelled=local,
                seed=seed,
                llm_batch_size=llm_batch_size,
            )
            plan = []
            for item in selected:
                options = _evals.settings_of(item, model, given.get(item.name, {}), local, llm_batch_size)
                plan += [(item, width, _evals.clip(item, options, width)) for width in widths]
            result = _run_all(bench, plan, overwrite, on_start)
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    return result


def _run_all(
    bench: Bench,
    plan: Sequence[tuple[_evals.Eval, int, dict[str, Any]]],
    overwrite: bool,
    on_start: Callable[[str, int], None] | None,
) -> SAEBenchResult:
    finished = {(item.name, width): bench.finished(item, width, options) for item, width, options in plan}
    if not overwrite:
        other = [f"{name} of prefix {width}" for (name, width), found in finished.items() if found == "other"]
        if other:
            raise ValueError(
                f"out={str(bench.out)!r} has {', '.join(other)} of another model, other settings or other "
                "data. Choose another folder, or overwrite them."
            )
    results: list[PrefixEval] = []
    failures: list[str] = []
    for item, width, options in plan:
        found = finished[item.name, width]
        if isinstance(found, PrefixEval) and not overwrite:
            results.append(found)
            continue
        if on_start is not None:
            on_start(item.name, width)
        try:
            results.append(bench.run(item, width, options))
        except Exception as error:  # the others are worth having
            failures.append(f"{item.name}, prefix {width}: {error}")
    metadata = bench.sae.cfg.metadata
    result = SAEBenchResult(
        model_name=bench.model_name,
        hook_name=metadata.hook_name,
        hook_name_out=metadata.hook_name_out or metadata.hook_name,
        folder=bench.out,
        evals=results,
    )
    others = [one for one in bench.kept() if (one.eval, one.width) not in finished]
    together = sorted([*results, *others], key=lambda one: (list(_evals.EVALS).index(one.eval), one.width))
    write_atomically(bench.out / "results.json", dataclasses.replace(result, evals=together).to_json())
    if failures:
        raise SAEBenchError(
            "SAEBench gave fewer results than prefixes went in (what it gave is saved):\n  "
            + "\n  ".join(failures),
            result,
        )
    return result


def _widths(sae: SAE[Any], prefixes: Sequence[int] | str) -> list[int]:
    if isinstance(prefixes, str):
        if prefixes != "auto":
            raise ValueError(f"prefixes={prefixes!r}: expected 'auto' or widths.")
        return matryoshka_widths(sae)
    wrong = [width for width in prefixes if not 0 < width <= sae.cfg.d_sae]
    if wrong or not prefixes:
        raise ValueError(f"prefixes={list(prefixes)}: expected widths from 1 to d_sae={sae.cfg.d_sae}.")
    return sorted(set(prefixes))


def _check_model(sae: SAE[Any], model: HookedTransformer) -> None:
    if not isinstance(model, HookedTransformer):
        raise ValueError(f"model: SAEBench works on a HookedTransformer, not on a {type(model).__name__}.")
    source, target, _ = hooks_and_frame(sae, model)
    layer_of(source)
    layer_of(target)
