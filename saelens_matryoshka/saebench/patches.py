"""Everything that is changed in SAEBench, and only while an eval runs.

SAEBench 0.6.0 is written for SAEs of models that it loads itself, on datasets that it downloads itself.
`patched(job)` makes it use the language model, the local data and the cache folder it is given, and, for
a transcoder, train its probes in the target's space. What each patch is for is said at its function;
`TARGETS` lists all that is replaced, with the parameters relied on, and `check` says plainly when a
release of SAEBench has moved one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from sae_lens.evals import ExplainedVarianceCalculator

from saelens_matryoshka.saebench.data import LabelledText
from saelens_matryoshka.saebench.process import mark_complete, seed_everything, unchanged_process
from saelens_matryoshka.saebench.requirements import VERSION
from saelens_matryoshka.saebench.views import PairView

_CORE = "sae_bench.evals.core.main"
_ABSORPTION = "sae_bench.evals.absorption.main"
_ABSORPTION_COMMON = "sae_bench.evals.absorption.common"
_FEATURE_ABSORPTION = "sae_bench.evals.absorption.feature_absorption"
_SPARSE_PROBING = "sae_bench.evals.sparse_probing.main"
_SCR_AND_TPP = "sae_bench.evals.scr_and_tpp.main"
_ACTIVATIONS = "sae_bench.sae_bench_utils.activation_collection"
_DATASETS = "sae_bench.sae_bench_utils.dataset_utils"
_DATASET_INFO = "sae_bench.sae_bench_utils.dataset_info"
_SCR_DATASETS = "sae_bench.evals.scr_and_tpp.dataset_creation"
_PROBES = "sae_bench.evals.sparse_probing.probe_training"
_SAE_PROBES_EVALS = "sae_probes.run_sae_evals"
_SAE_PROBES_BASELINES = "sae_probes.run_baselines"
_SAE_PROBES_DATA = "sae_probes.utils_data"

TARGETS: dict[tuple[str, str], tuple[str, ...]] = {
    (_CORE, "HookedTransformer"): (),
    (_CORE, "get_sparsity_and_variance_metrics"): ("sae", "activation_store", "ignore_tokens"),
    (_CORE, "get_featurewise_weight_based_metrics"): ("sae",),
    (_ABSORPTION, "HookedTransformer"): (),
    (_ABSORPTION, "run_k_sparse_probing_experiment"): (
        *("model", "layer", "prompt_template", "prompt_token_pos", "device"),
        *("experiment_dir", "probes_dir"),
    ),
    (_ABSORPTION, "run_feature_absortion_experiment"): (
        *("experiment_dir", "sparse_probing_experiment_dir", "probes_dir"),
    ),
    (_ABSORPTION_COMMON, "load_or_train_probe"): (
        *("model", "base_template", "pos_idx", "layer", "probes_dir", "device"),
    ),
    (_ABSORPTION_COMMON, "get_alpha_tokens"): ("tokenizer",),
    (_ABSORPTION_COMMON, "train_linear_probe_for_task"): ("train_activations", "test_activations"),
    (_FEATURE_ABSORPTION, "get_alpha_tokens"): ("tokenizer",),
    (_SPARSE_PROBING, "HookedTransformer"): (),
    (_ACTIVATIONS, "create_meaned_model_activations"): ("all_llm_activations_BLD",),
    (_ACTIVATIONS, "get_sae_meaned_activations"): ("all_llm_activations_BLD", "sae", "sae_batch_size"),
    (_DATASETS, "get_multi_label_train_test_data"): (
        *("dataset_name", "train_set_size", "test_set_size", "random_seed"),
    ),
    (_DATASET_INFO, "chosen_classes_per_dataset"): (),
    (_DATASET_INFO, "dataset_metadata"): (),
    (_SCR_AND_TPP, "HookedTransformer"): (),
    (_SCR_AND_TPP, "COLUMN2_VALS_LOOKUP"): (),
    (_SCR_AND_TPP, "get_all_node_effects_for_one_sae"): ("sae", "probes"),
    (_SCR_DATASETS, "get_train_test_data"): (
        *("dataset_name", "spurious_corr", "train_set_size", "test_set_size", "random_seed"),
        *("column1_vals", "column2_vals"),
    ),
    (_SCR_DATASETS, "get_spurious_corr_data"): (
        *("df", "column1_vals", "column2_vals", "dataset_name"),
        *("min_samples_per_quadrant", "random_seed"),
    ),
    (_PROBES, "train_probe_on_activations"): ("train_activations", "test_activations"),
    (_PROBES, "Probe"): ("activation_dim", "dtype"),
    (_SAE_PROBES_EVALS, "ensure_dataset_activations"): ("model", "max_seq_len", "batch_size"),
    (_SAE_PROBES_BASELINES, "ensure_dataset_activations"): ("model", "max_seq_len", "batch_size"),
    (_SAE_PROBES_DATA, "ensure_dataset_activations"): ("model", "max_seq_len", "batch_size"),
    (_SAE_PROBES_BASELINES, "get_xy_traintest"): ("num_train", "numbered_dataset_tag"),
}
"""(module, name) of all that is replaced or relied on, with the parameters it must have."""


@dataclass
class Job:
    """One eval of one prefix, and what the patches are to put in SAEBench's place."""

    eval_name: str
    options: Mapping[str, Any]
    """the eval's settings"""
    model: Any
    """what SAEBench's `from_pretrained` gives: the HookedTransformer, or a `HookAlias` of it"""
    cache: Path
    """folder for probes and activations, of this language model, hook and data alone"""
    scratch: Path
    """empty folder for what SAEBench writes relative to the working directory"""
    seed: int
    pair: PairView | None = None
    """the view, when it is a transcoder's pair of source and target"""
    labelled: LabelledText | None = None
    """local texts in place of SAEBench's datasets"""
    llm_batch_size: int = 32
    explained_variance: ExplainedVarianceCalculator = field(default_factory=ExplainedVarianceCalculator)
    """filled by `core`"""


class Unsuitable(Exception):
    """The language model does not have what the eval measures; the message says what."""


def check() -> None:
    """Check that SAEBench still is what the patches expect.

    Raises:
        RuntimeError: Something has moved; the message names all of it.
    """
    moved = []
    for (module_name, name), parameters in TARGETS.items():
        try:
            target = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError):
            moved.append(f"{module_name}.{name} is not there")
            continue
        if parameters:
            known = inspect.signature(inspect.unwrap(target)).parameters
            gone = [parameter for parameter in parameters if parameter not in known]
            if gone:
                moved.append(f"{module_name}.{name} has no parameter {', '.join(gone)}")
    if moved:
        raise RuntimeError(
            f"saebench knows the insides of sae-bench {VERSION}, and these are not as expected:\n  "
            + "\n  ".join(moved)
            + f"\nInstall it as it was:  pip install --no-deps sae-bench=={VERSION} 'sae-probes==0.4.2'"
        )


@contextmanager
def patched(job: Job) -> Iterator[None]:
    """SAEBench with all patches; afterwards everything is as before, the process's state too."""
    check()
    with ExitStack() as stack:
        stack.enter_context(unchanged_process(job.model.tokenizer, job.scratch, job.seed))
        for (module_name, name), replacement in _replacements(job).items():
            module = importlib.import_module(module_name)
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def _replacements(job: Job) -> dict[tuple[str, str], Any]:
    def original(target: tuple[str, str]) -> Any:
        return getattr(importlib.import_module(target[0]), target[1])

    def wrapped(target: tuple[str, str], wrap: Callable[..., Any]) -> tuple[tuple[str, str], Any]:
        function = original(target)
        return target, functools.wraps(function)(functools.partial(wrap, job, function))

    loader = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: job.model)
    replacements = {
        (module, "HookedTransformer"): loader
        for module in (_CORE, _ABSORPTION, _SPARSE_PROBING, _SCR_AND_TPP)
    }
    wraps: list[tuple[tuple[str, str], Callable[..., Any]]] = [
        ((_CORE, "get_sparsity_and_variance_metrics"), _with_explained_variance),
        ((_CORE, "get_featurewise_weight_based_metrics"), _in_shared_space),
        ((_ABSORPTION, "run_k_sparse_probing_experiment"), _cached_and_seeded_probing),
        ((_ABSORPTION, "run_feature_absortion_experiment"), _cached_and_seeded_absorption),
        ((_ABSORPTION_COMMON, "get_alpha_tokens"), _words_of_one_token),
        ((_FEATURE_ABSORPTION, "get_alpha_tokens"), _words_of_one_token),
        ((_ACTIVATIONS, "get_sae_meaned_activations"), _seeded),
        ((_SCR_AND_TPP, "get_all_node_effects_for_one_sae"), _seeded),
        ((_SAE_PROBES_EVALS, "ensure_dataset_activations"), _of_this_model),
        ((_SAE_PROBES_BASELINES, "ensure_dataset_activations"), _of_this_model),
        ((_SAE_PROBES_DATA, "ensure_dataset_activations"), _of_this_model),
    ]
    if job.pair is not None:
        wraps += _IN_TARGET_SPACE[job.eval_name]
    replacements |= dict(wrapped(target, wrap) for target, wrap in wraps)
    if job.labelled is not None:
        replacements |= _local_datasets(job.labelled, original)
    return replacements


# ---- core


def _with_explained_variance(job: Job, function: Any, sae: Any, *args: Any, **kwargs: Any) -> Any:
    """SAELens's explained variance on the tokens of SAEBench's own, which changes with the scale."""
    signature = inspect.signature(function)
    bound = signature.bind(sae, *args, **kwargs)
    tap = _Tap(sae, bound.arguments["activation_store"], bound.arguments["ignore_tokens"], job)
    bound.arguments["sae"] = bound.arguments["activation_store"] = tap
    return function(*bound.args, **bound.kwargs)


class _Tap:
    """An SAE and its token store, whose reconstructions are counted where the tokens count."""

    def __init__(self, sae: Any, store: Any, ignored: set[int | None], job: Job) -> None:
        self._sae, self._store, self._job = sae, store, job
        self._ignored = torch.tensor([token for token in ignored if token is not None], dtype=torch.long)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sae, name)

    def get_batch_tokens(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = self._store.get_batch_tokens(*args, **kwargs)
        self._counted = ~torch.isin(tokens, self._ignored.to(tokens.device))
        return tokens

    def encode(self, target: torch.Tensor) -> torch.Tensor:
        self._target = target
        return self._sae.encode(target)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        output = self._sae.decode(feature_acts)
        counted = self._counted.to(output.device)
        target = self._target.to(output.device)
        self._job.explained_variance.add_batch(output[counted], target[counted])
        return output


def _in_shared_space(job: Job, function: Any, sae: Any) -> Any:  # noqa: ARG001
    """Encoder and decoder of a transcoder live in different spaces, maybe of different widths.

    Their cosine is 0 here; nothing reads it.
    """
    if (transcoder := getattr(sae, "transcoder", None)) is not None:
        view = PairView(transcoder, sae.cfg.hook_name)
        view.cfg = sae.cfg  # SAEBench adds names to it
        sae = view
    return function(sae)


# ---- absorption


def _cached_and_seeded_probing(job: Job, function: Any, **kwargs: Any) -> Any:
    """Probes in our cache, not in site-packages under the model's name; the same with and without it.

    SAEBench ends silently, after hours, where the language model knows too few first letters.
    """
    common = importlib.import_module(_ABSORPTION_COMMON)
    same = {
        "model": kwargs["model"],
        "base_template": kwargs["prompt_template"],
        "pos_idx": kwargs["prompt_token_pos"],
        "layer": kwargs["layer"],
        "probes_dir": job.cache,
        "device": kwargs["device"],
    }
    seed_everything(job.seed)
    probe = common.load_or_train_probe(**same)
    mark_complete(job.cache)
    activations, words = common.load_probe_data_split_or_train(**same, split="test")
    letters = torch.tensor([letter for _, letter in words])
    with torch.inference_mode():
        found = _f1_by_letter(probe(activations).cpu() > 0, letters)
    n_known = int((found > job.options["min_GT_probe_f1"]).sum())
    if n_known < job.options["min_feats_for_eval"]:
        raise Unsuitable(
            f"probes find {n_known} first letters in the language model, and "
            f"{job.options['min_feats_for_eval']} are needed"
        )
    seed_everything(job.seed)
    return function(**kwargs, experiment_dir=job.scratch / "k_sparse_probing", probes_dir=job.cache)


def _f1_by_letter(predicted: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
    """F1 of one-against-all predictions `[n_words, 26]`; letters without words score 0."""
    actual = torch.nn.functional.one_hot(letters, predicted.shape[1]).bool()
    hits = (predicted & actual).sum(dim=0)
    return 2 * hits / (predicted.sum(dim=0) + actual.sum(dim=0)).clamp(min=1)


def _cached_and_seeded_absorption(job: Job, function: Any, **kwargs: Any) -> Any:
    seed_everything(job.seed)
    return function(
        **kwargs,
        experiment_dir=job.scratch / "feature_absorption",
        sparse_probing_experiment_dir=job.scratch / "k_sparse_probing",
        probes_dir=job.cache,
    )


def _words_of_one_token(job: Job, function: Any, tokenizer: Any, **kwargs: Any) -> list[str]:  # noqa: ARG001
    """The words that are one token in a prompt too.

    The position that absorption reads is counted from the prompt's end, and all prompts must have the
    same length.
    """
    words = function(tokenizer, **kwargs)
    if not words:
        return words
    prompts = [f"\n{word} has" for word in words]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    usual = min(lengths)
    return [word for word, length in zip(words, lengths, strict=True) if length == usual]


def _letter_probes_of_target(
    job: Job, function: Any, *, train_activations: Any, test_activations: Any, **kwargs: Any
) -> Any:
    """First-letter probes on y; they are asked about `[x | y]`, so their weights on x are zero."""
    assert job.pair is not None
    d_source = job.pair.d_source
    probe, data = function(
        train_activations=np.ascontiguousarray(train_activations[:, d_source:]),
        test_activations=np.ascontiguousarray(test_activations[:, d_source:]),
        **kwargs,
    )
    _ignore_source(probe.fc, d_source)
    for name, activations in (("X_train", train_activations), ("X_test", test_activations)):
        data[name] = torch.from_numpy(np.array(activations)).to(data[name])
    return probe, data


def _ignore_source(layer: torch.nn.Linear, d_source: int) -> None:
    weight = layer.weight.detach()
    weight = torch.cat([weight.new_zeros(len(weight), d_source), weight], dim=1)
    layer.weight = torch.nn.Parameter(weight)
    layer.in_features = weight.shape[1]


# ---- probing, SCR, TPP


def _seeded(job: Job, function: Any, *args: Any, **kwargs: Any) -> Any:
    """What follows the language model's probes is the same whether they were trained or cached."""
    seed_everything(job.seed)
    return function(*args, **kwargs)


def _means_of_targets(job: Job, function: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Sparse probing: the language model's own probes see y of `[x | y]`; the latents' are as they were."""
    assert job.pair is not None
    return _targets(function(*args, **kwargs), job.pair.d_source)


def _probes_of_targets(
    job: Job, function: Any, train_activations: Any, test_activations: Any, *args: Any, **kwargs: Any
) -> Any:
    """SCR and TPP: probes are trained on y and asked about `[x | y]`, so their weights on x are zero."""
    assert job.pair is not None
    d_source = job.pair.d_source
    train, test = _targets(train_activations, d_source), _targets(test_activations, d_source)
    probes, accuracies = function(train, test, *args, **kwargs)
    for probe in probes.values():
        _ignore_source(probe.net, d_source)
    return probes, accuracies


def _targets(pairs: dict[str, torch.Tensor], d_source: int) -> dict[str, torch.Tensor]:
    return {name: pair[..., d_source:].contiguous() for name, pair in pairs.items()}


def _local_datasets(labelled: LabelledText, original: Callable[..., Any]) -> dict[tuple[str, str], Any]:
    """The local texts, under their name, in place of SAEBench's downloads."""
    get_classes = original((_DATASETS, "get_multi_label_train_test_data"))
    get_pairs = original((_SCR_DATASETS, "get_train_test_data"))
    balance = original((_SCR_DATASETS, "get_spurious_corr_data"))

    def multi_label(dataset_name: str, train_set_size: int, test_set_size: int, random_seed: int) -> Any:
        if dataset_name != labelled.name:
            return get_classes(dataset_name, train_set_size, test_set_size, random_seed)
        return labelled.classes(train_set_size // 2, test_set_size // 2, random_seed)

    def train_test(
        dataset_name: str,
        spurious_corr: bool,
        train_set_size: int,
        test_set_size: int,
        random_seed: int,
        column1_vals: Any = None,
        column2_vals: Any = None,
    ) -> Any:
        sizes = (train_set_size, test_set_size)
        if dataset_name != labelled.name:
            return get_pairs(dataset_name, spurious_corr, *sizes, random_seed, column1_vals, column2_vals)
        if not spurious_corr:
            return multi_label(dataset_name, *sizes, random_seed)
        return tuple(
            balance(
                labelled.frame(split, random_seed),
                column1_vals,
                column2_vals,
                dataset_name,
                size // 4,
                random_seed,
            )
            for split, size in zip(("train", "test"), sizes, strict=True)
        )

    labels, attributes = labelled.labels, labelled.attributes
    return {
        (_DATASETS, "get_multi_label_train_test_data"): multi_label,
        (_SCR_DATASETS, "get_train_test_data"): train_test,
        (_DATASET_INFO, "chosen_classes_per_dataset"): {
            **original((_DATASET_INFO, "chosen_classes_per_dataset")),
            labelled.name: labels,
        },
        (_DATASET_INFO, "dataset_metadata"): {
            **original((_DATASET_INFO, "dataset_metadata")),
            labelled.name: {
                "text_column_name": "text",
                "column1_name": "label",
                "column2_name": "attribute",
                "column1_mapping": {label: label for label in labels},
                "column2_mapping": {attribute: attribute for attribute in attributes},
            },
        },
        (_SCR_AND_TPP, "COLUMN2_VALS_LOOKUP"): {
            **original((_SCR_AND_TPP, "COLUMN2_VALS_LOOKUP")),
            labelled.name: tuple(attributes[:2]),
        },
    }


# ---- sae_probes


def _of_this_model(job: Job, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Activations of the model that is there, no longer than its context."""
    kwargs |= {
        "model": job.model,
        "max_seq_len": min(1024, job.model.cfg.n_ctx),
        "batch_size": job.llm_batch_size,
        "device": str(job.model.cfg.device),
    }
    return function(*args, **kwargs)


def _target_columns(job: Job, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The language model's own probes see y of `[x | y]`."""
    assert job.pair is not None
    X_train, y_train, X_test, y_test = function(*args, **kwargs)
    return X_train[:, job.pair.d_source :], y_train, X_test[:, job.pair.d_source :], y_test


_IN_TARGET_SPACE: dict[str, list[tuple[tuple[str, str], Callable[..., Any]]]] = {
    "absorption": [((_ABSORPTION_COMMON, "train_linear_probe_for_task"), _letter_probes_of_target)],
    "sparse_probing": [((_ACTIVATIONS, "create_meaned_model_activations"), _means_of_targets)],
    "sae_probes": [((_SAE_PROBES_BASELINES, "get_xy_traintest"), _target_columns)],
    "scr": [((_PROBES, "train_probe_on_activations"), _probes_of_targets)],
    "tpp": [((_PROBES, "train_probe_on_activations"), _probes_of_targets)],
}
"""Where each eval trains probes on a transcoder's `[x | y]`, and what makes them see y alone."""
