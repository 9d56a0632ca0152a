"""A dictionary in shards is evaluated as the whole is, by all processes, and nothing moves meanwhile."""

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
from saelens_matryoshka.evaluation.training_evaluator import HeldOutEvaluator
from saelens_matryoshka.parallel.dictionary import shard
from saelens_matryoshka.parallel.trainer import parallelize
from tests.helpers import run_steps, trainer_for
from tests.parallel.processes import group_of, run_in_processes
from tests.parallel.test_data import numbered, share_of
from tests.parallel.test_training import sae_of

D, D_SAE, BATCH, CONTEXT = 128, 50, 32, 16
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
    """Metrics of a dictionary, and whether it trains on as it does without evaluations."""
    torch.manual_seed(0)
    model = tiny.load_hooked_transformer()
    tokens = torch.randint(model.cfg.d_vocab, (32, CONTEXT))
    seen = hook_activations(model, tokens, list(HOOKS.values()))
    names = ["source"] if case["kind"] == "sae" else list(HOOKS)
    rows = torch.cat([seen[HOOKS[name]].flatten(0, 1) for name in names], dim=-1).detach()
    batches = list(rows.split(BATCH))

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
        trainer.evaluator = HeldOutEvaluator(model, tokens[:6], 4, False, {})
        if mesh is not None:
            parallelize(trainer, group)
        metrics = []
        for _ in range(2):
            if with_evaluations:
                metrics.append(trainer.evaluator(sae, trainer.data_provider, trainer.activation_scaler))
            run_steps(trainer, [next(trainer.data_provider)])
        return metrics, [tensor.clone() for tensor in sae.state_dict().values()]

    metrics, with_evaluations = train_on(with_evaluations=True)
    _, without = train_on(with_evaluations=False)
    return {"metrics": metrics[0], "unmoved": all(map(torch.equal, with_evaluations, without))}


def evaluate_all(mesh: tuple[int, int], names: list[str]) -> dict[str, Any]:
    return {name: evaluated(CASES[name], mesh) for name in names}


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return evaluated(CASES[name], None)


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        ((1, 2), ["skip, expected_average_only_in"]),
        *(pytest.param(mesh, list(CASES), marks=pytest.mark.slow) for mesh in ((2, 1), (1, 2), (2, 2))),
    ],
    ids=str,
)
def test_shards_are_evaluated_as_the_whole(mesh: tuple[int, int], names: list[str], tmp_path: Path) -> None:
    results = run_in_processes(mesh[0] * mesh[1], tmp_path, evaluate_all, mesh, names)
    for name in names:
        expected = alone(name)
        assert 0 < expected["metrics"][f"held_out/dead_fraction_w{D_SAE}"] < 1
        for by_case in results:
            assert by_case[name]["unmoved"], name
            assert _flat(by_case[name]["metrics"]) == pytest.approx(
                _flat(expected["metrics"]), rel=1e-5, abs=1e-5
            ), name


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
