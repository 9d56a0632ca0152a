from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from tests.saebench.dictionaries import labelled_words, random_dictionary, spelling_words

pytestmark = pytest.mark.usefixtures("sae_bench")

SMALL: dict[str, dict[str, Any]] = {
    "core": {
        "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 1,
        "eval_batch_size_prompts": 4,
        "context_size": 32,
    },
    "absorption": {
        # The embedded model cannot spell: this is to run, not to mean something.
        "min_GT_probe_f1": 0.0,
        "min_feats_for_eval": 2,
        "k_sparse_probe_num_epochs": 2,
        "max_k_value": 2,
        "llm_batch_size": 100,
    },
    "sae_probes": {"dataset_names": ["119_us_state_TX"]},
    "scr": {"probe_epochs": 3},
    "tpp": {"probe_epochs": 3},
}


@pytest.fixture(scope="module")
def text() -> datasets.Dataset:
    return tiny.text.dataset("held_out").select(range(10))


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_bench.evals.absorption import common, feature_absorption

    for module in (common, feature_absorption):
        monkeypatch.setattr(module, "get_alpha_tokens", lambda tokenizer, **_: spelling_words(tokenizer, 12))


def _state(model: HookedTransformer) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "folder": Path.cwd(),
        "sides": (model.tokenizer.padding_side, model.tokenizer.truncation_side),  # type: ignore[union-attr]
        "hooks": {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()},
    }


@pytest.mark.slow
@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip_transcoder"])
def test_all_six_evals_of_every_prefix(
    kind: str, tiny_model: HookedTransformer, text: datasets.Dataset, tmp_path: Path
) -> None:
    if kind == "sae":
        sae = random_dictionary("blocks.2.hook_resid_post", None)
    else:
        sae = random_dictionary(skip=kind == "skip_transcoder")
    weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    before = _state(tiny_model)
    result = sm.saebench.run(
        sae, tiny_model, tmp_path / "out", text=text, labelled=labelled_words(), settings=SMALL
    )
    assert _state(tiny_model) == before
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in weights.items())
    assert {(item.eval, item.width) for item in result.evals} == {
        (name, width) for name in sm.saebench.EVALS for width in (16, 64)
    }
    for item in result.evals:
        assert item.skipped is None
        assert item.space == ("input" if kind == "sae" else "output")
        assert item.l0 is not None
        assert 0 < item.l0 <= item.width
        known = [item.metrics.get(name) for name in sm.saebench.EVALS[item.eval].figures]
        assert any(value is not None for value in known), item
        folder = tmp_path / "out" / f"width-{item.width}"
        saved = json.loads((folder / f"{item.eval}.json").read_text())
        assert saved["metrics"] == item.metrics
        assert json.loads((folder / f"{item.eval}.saebench.json").read_text())["sae_lens_release_id"]
    # more latents than there are in the prefix are not ablated
    assert "scr_metric_threshold_20" not in result["scr", 16].metrics
    assert "scr_metric_threshold_20" in result["scr", 64].metrics
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result.to_dict()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.json",
        "width-16",
        "width-64",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    console = Console(width=80, record=True)
    console.print(result.table())
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("L0") == 6
    assert ("space: output" in shown) == (kind != "sae")


def test_absorption_writes_nothing_into_site_packages() -> None:
    from sae_bench.evals.absorption.common import RESULTS_DIR

    assert not RESULTS_DIR.exists()


def test_what_is_finished_is_read_again_and_nothing_is_mixed(
    tiny_model: HookedTransformer,
    text: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: dict[str, Any] = {"evals": ["core"], "text": text, "settings": SMALL}
    sae = random_dictionary()
    first = sm.saebench.run(sae, tiny_model, tmp_path, prefixes=[16], **arguments)
    started: list[tuple[str, int]] = []
    arguments["on_start"] = lambda name, width: started.append((name, width))
    second = sm.saebench.run(sae, tiny_model, tmp_path, **arguments)
    assert started == [("core", 64)]
    assert second["core", 16] == first["core", 16]
    # other settings, another model, another seed: refused
    saved = (tmp_path / "width-16" / "core.json").read_text()
    other = random_dictionary(skip=True)
    for changed, values in (
        (sae, {"settings": {"core": {**SMALL["core"], "context_size": 16}}}),
        (other, {}),
        (sae, {"seed": 1}),
    ):
        with pytest.raises(ValueError, match=r"core of prefix 16.*overwrite"):
            sm.saebench.run(changed, tiny_model, tmp_path, **{**arguments, **values})
    assert (tmp_path / "width-16" / "core.json").read_text() == saved
    started.clear()
    third = sm.saebench.run(other, tiny_model, tmp_path, overwrite=True, **arguments)
    assert started == [("core", 16), ("core", 64)]
    assert third["core", 16] != first["core", 16]
    monkeypatch.undo()


def test_fewer_results_than_prefixes_is_an_error_that_keeps_the_others(
    tiny_model: HookedTransformer,
    text: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sae_bench.evals.core import main

    evaluate = main.run_evals

    def fails_on_the_narrow(*args: Any, **kwargs: Any) -> Any:
        if kwargs["sae"].cfg.d_sae == 16:
            raise RuntimeError("out of luck")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(main, "run_evals", fails_on_the_narrow)
    with pytest.raises(sm.saebench.SAEBenchError, match=r"core, prefix 16: .*out of luck") as caught:
        sm.saebench.run(random_dictionary(), tiny_model, tmp_path, evals=["core"], text=text, settings=SMALL)
    assert [item.width for item in caught.value.result.evals] == [64]
    assert (tmp_path / "width-64" / "core.json").exists()
    assert not (tmp_path / "width-16" / "core.json").exists()
    assert "out of luck" in (tmp_path / "width-16" / "core.log").read_text()


@pytest.mark.parametrize("name", ["sparse_probing", "tpp", "scr"])
def test_a_prefix_scores_the_same_alone_and_after_others(
    name: str, tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"evals": [name], "labelled": labelled_words(), "settings": SMALL}
    together = sm.saebench.run(random_dictionary(), tiny_model, tmp_path / "both", **arguments)
    alone = sm.saebench.run(random_dictionary(), tiny_model, tmp_path / "one", prefixes=[64], **arguments)
    assert alone[name, 64] == together[name, 64]


def test_a_prefix_too_narrow_for_an_eval_is_skipped_with_the_reason(
    tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    result = sm.saebench.run(random_dictionary(), tiny_model, tmp_path, evals=["absorption"], prefixes=[8])
    assert result["absorption", 8].skipped == "absorption needs 10 latents"
    console = Console(width=80, record=True)
    console.print(result.table())
    assert "absorption needs 10 latents" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"evals": ["core", "ravel"]}, "evals='core,ravel'"),
        ({"prefixes": [16, 65]}, r"prefixes=\[16, 65\].*d_sae=64"),
        ({"prefixes": "all"}, "prefixes='all'"),
        ({"settings": {"ravel": {}}}, "settings: ravel"),
        ({"settings": {"tpp": {"n": 1}}}, "tpp has no setting n; it has .*n_values"),
        ({"labelled": "nowhere"}, "labelled='nowhere' is no folder"),
        ({"text": "./nowhere"}, r"text='./nowhere': there is no such"),
    ],
)
def test_bad_arguments_are_one_message_and_leave_nothing(
    arguments: dict[str, Any], says: str, tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        sm.saebench.run(random_dictionary(), tiny_model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
