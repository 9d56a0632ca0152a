"""What is written of a run of SAEBench; what SAEBench itself computes is made up here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformer_lens import HookedTransformer

from saelens_matryoshka.saebench.single import Bench
from tests.saebench.dictionaries import random_dictionary

run_module = importlib.import_module("saelens_matryoshka.saebench.run")


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "require_sae_bench", lambda: None)
    monkeypatch.setattr(run_module._evals, "settings_of", lambda _item, _model, given, *_: dict(given))
    monkeypatch.setattr(run_module._evals, "clip", lambda _item, options, _width: options)
    monkeypatch.setattr(Bench, "_bench", lambda *_: (1.0, {}))


def _table(folder: Path) -> list[tuple[str, int]]:
    found = json.loads((folder / "results.json").read_text())["evals"]
    return [(one["eval"], one["width"]) for one in found]


def test_the_table_has_what_earlier_calls_left_of_the_same_model_and_seed(
    tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    def run(sae: Any = None, **arguments: Any) -> None:
        found = run_module.run(sae or random_dictionary(), tiny_model, tmp_path, **arguments)
        assert {one.eval for one in found.evals} == set(arguments["evals"])  # this call's

    run(evals=["tpp"], prefixes=[16])
    run(evals=["core"], prefixes=[64])
    run(evals=["core"], prefixes=[16])
    assert _table(tmp_path) == [("core", 16), ("core", 64), ("tpp", 16)]
    run(evals=["core"], prefixes=[16], seed=1, overwrite=True)
    assert _table(tmp_path) == [("core", 16)]
    run(random_dictionary(skip=True), evals=["core"], prefixes=[64], overwrite=True)
    assert _table(tmp_path) == [("core", 64)]
