from __future__ import annotations

import importlib

import pytest

from saelens_matryoshka.saebench import patches, requirements


@pytest.mark.usefixtures("sae_bench")
def test_sae_bench_is_where_the_patches_expect_it() -> None:
    patches.check()


@pytest.mark.usefixtures("sae_bench")
@pytest.mark.parametrize(("module", "name"), list(patches.TARGETS))
def test_what_has_moved_is_named(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(RuntimeError, match=rf"{module}\.{name} is not there") as caught:
        patches.check()
    assert "pip install --no-deps sae-bench==0.6.0" in str(caught.value)


@pytest.mark.usefixtures("sae_bench")
def test_a_changed_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sae_bench.evals.core.main")
    monkeypatch.setattr(module, "get_sparsity_and_variance_metrics", lambda sae, store: (sae, store))
    with pytest.raises(RuntimeError, match="has no parameter activation_store, ignore_tokens"):
        patches.check()


def test_missing_sae_bench_is_told_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = requirements.find_spec
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "sae_bench" else find_spec(name)
    )
    with pytest.raises(ImportError, match="sae_bench") as caught:
        requirements.require_sae_bench()
    assert 'pip install --editable ".[saebench]"' in str(caught.value)
    assert "pip install --no-deps sae-bench==0.6.0" in str(caught.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: name)
    monkeypatch.setattr(requirements, "installed_version", lambda: "0.7.0")
    with pytest.raises(ImportError, match=r"0\.6\.0, but 0\.7\.0 is installed"):
        requirements.require_sae_bench()
