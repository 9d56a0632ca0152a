"""Copies and shards of a dictionary are evaluated as the whole is, and nothing moves meanwhile."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from transformer_lens import HookedTransformer

from saelens_matryoshka import tiny
from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.evaluation.evaluator import evaluate_activations
from saelens_matryoshka.evaluation.result import EvalResult
from saelens_matryoshka.evaluation.training_evaluator import CachedEvaluator, HeldOutEvaluator
from saelens_matryoshka.parallel.dictionary import shard
from saelens_matryoshka.parallel.trainer import parallelize
from tests.helpers import run_steps, trainer_for
from tests.parallel.processes import group_of, run_in_processes
from tests.parallel.test_data import numbered, share_of
from tests.parallel.test_training import sae_of

D, D_SAE, BATCH, CONTEXT = 128, 50, 32, 16
# With two processes, the last prompt is only for the first of them.
N_PROMPTS, EVAL_BATCH = 5, 2
HOOKS = {"source": "blocks.2.hook_resid_pre", "target": "blocks.2.hook_mlp_out"}
KINDS: dict[str, dict[str, Any]] = {
    "sae": {"apply_b_dec_to_input": True},
    "transcoder": {"hook_name_out": HOOKS["target"]},
    "skip": {"hook_name_out": HOOKS["target"]},
}
CASES = {
    f"{kind}, {scaling}": {
        "kind": kind,
        "normalize_activations": scaling,
        "threshold_calibration": "l0",
        **settings,
    }
    for kind, settings in KINDS.items()
    for scaling in ("none", "expected_average_only_in")
}


def evaluated(case: dict[str, Any], mesh: tuple[int, int] | None) -> dict[str, Any]:
    """Metrics of a dictionary, on prompts and on rows of a cache; how many prompts the language model
    read for them; and whether the dictionary trains on as it does without evaluations."""
    torch.manual_seed(0)
    model = tiny.load_hooked_transformer()
    tokens = torch.randint(model.cfg.d_vocab, (32, CONTEXT))
    seen = hook_activations(model, tokens, list(HOOKS.values()))
    names = ["source"] if case["kind"] == "sae" else list(HOOKS)
    rows = torch.cat([seen[HOOKS[name]].flatten(0, 1) for name in names], dim=-1).detach()
    batches = list(rows.split(BATCH))
    pairs = list(zip(rows[:, :D].split(71), rows[:, -D:].split(71), strict=True))
    read: list[int] = []
    model.embed.register_forward_hook(lambda _, __, out: read.append(len(out) * (out.shape[1] == CONTEXT)))

    def train_on(*, with_evaluations: bool) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
        # one of two shards has nothing of the first prefix
        sae = sae_of({**case, "d_in": D, "matryoshka_widths": [1, 21, D_SAE]})
        sae.cfg.metadata.hook_name = HOOKS["source"]
        before = trainer_for(sae, batches)
        if case["normalize_activations"] != "none":
            before.activation_scaler.estimate_scaling_factor(D, iter(batches), 4)
        run_steps(before, batches)
        own = batches
        if mesh is not None:
            group = group_of(*mesh, D_SAE)
            if group.shards > 1:
                shard(sae, group, "cpu")
            n = BATCH // group.size
            own = [batch[group.rank * n : (group.rank + 1) * n] for batch in batches]
        trainer = trainer_for(sae, own, train_batch_size_samples=BATCH)
        trainer.activation_scaler = before.activation_scaler
        excluded = tokens[0, :2].tolist()
        trainer.evaluator = HeldOutEvaluator(model, tokens[:N_PROMPTS], EVAL_BATCH, excluded, {})
        if mesh is not None:
            parallelize(trainer, group)
        metrics = []
        for _ in range(2):
            if with_evaluations:
                evaluate = (trainer.evaluator, CachedEvaluator(functools.partial(_on_rows, pairs, model)))
                metrics += [one(sae, trainer.data_provider, trainer.activation_scaler) for one in evaluate]
            run_steps(trainer, [next(trainer.data_provider)])
        return metrics, [tensor.clone() for tensor in sae.state_dict().values()]

    metrics, with_evaluations = train_on(with_evaluations=True)
    _, without = train_on(with_evaluations=False)
    return {
        "metrics": _flat(metrics[0]) | {f"cached {name}": n for name, n in _flat(metrics[1]).items()},
        "read": sum(read) / 2,
        "unmoved": all(map(torch.equal, with_evaluations, without)),
    }


def _on_rows(pairs: list[Any], model: Any, sae: Any, **settings: Any) -> EvalResult:
    return evaluate_activations(sae, model, pairs, **settings)


def evaluate_all(mesh: tuple[int, int], names: list[str]) -> dict[str, Any]:
    return {name: evaluated(CASES[name], mesh) for name in names}


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return evaluated(CASES[name], None)


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        ((2, 1), ["transcoder, none"]),
        ((1, 2), ["skip, expected_average_only_in"]),
        *(pytest.param(mesh, list(CASES), marks=pytest.mark.slow) for mesh in ((2, 1), (1, 2), (2, 2))),
    ],
    ids=str,
)
def test_all_evaluate_as_one_and_divide_the_prompts(
    mesh: tuple[int, int], names: list[str], tmp_path: Path
) -> None:
    size = mesh[0] * mesh[1]
    results = run_in_processes(size, tmp_path, evaluate_all, mesh, names)
    own = sum(-(-len(batch) // size) for batch in torch.arange(N_PROMPTS).split(EVAL_BATCH * size))
    for name in names:
        expected = alone(name)
        assert 0 < expected["metrics"][f"held_out/dead_fraction_w{D_SAE}"] < 1
        assert max(by_case[name]["read"] for by_case in results) == expected["read"] * own / N_PROMPTS
        for by_case in results:
            assert by_case[name]["unmoved"], name
            assert by_case[name]["metrics"] == pytest.approx(expected["metrics"], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("n_files", [None, 1, 4])
def test_all_processes_hold_out_the_same_prompts(n_files: int | None, tiny_model: HookedTransformer) -> None:
    dataset: Any = numbered(44)
    if n_files is not None:
        dataset = dataset.to_iterable_dataset(num_shards=n_files)
    evaluators = [
        HeldOutEvaluator.in_place_of(
            LLMSaeEvaluator(tiny_model, share_of(tiny_model, dataset, rank, 2), 3, 1, {})
        )
        for rank in range(2)
    ]
    for evaluator in evaluators:
        assert evaluator is not None
        assert evaluator.tokens[:, 0].tolist() == [0, 1, 2]


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        flat |= (
            {f"{key} {name}": number for name, number in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return flat
