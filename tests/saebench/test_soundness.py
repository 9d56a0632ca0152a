"""SAEBench's figures of dictionaries whose figures are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from tests.saebench.dictionaries import (
    EMBEDDING,
    N_ABSORBED,
    Speller,
    dictionary,
    labelled_words,
    random_dictionary,
    word_detectors,
)

pytestmark = pytest.mark.usefixtures("sae_bench")

CORE = {
    "n_eval_reconstruction_batches": 2,
    "n_eval_sparsity_variance_batches": 2,
    "eval_batch_size_prompts": 4,
    "context_size": 64,
}
ABSORPTION = {"k_sparse_probe_batch_size": 64, "max_k_value": 3, "llm_batch_size": 100}


@pytest.fixture(scope="module")
def text() -> datasets.Dataset:
    """One document, so that SAEBench puts no separator into it."""
    return datasets.Dataset.from_dict({"text": ["".join(tiny.text.dataset("held_out")[:4]["text"])[:20_000]]})


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tokens that core takes: those of the replacements, then those of the reconstructions."""
    from sae_lens import ActivationsStore

    taken: list[torch.Tensor] = []
    get = ActivationsStore.get_batch_tokens

    def recorded(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = get(self, *args, **kwargs)
        taken.append(tokens)
        return tokens

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", recorded)
    return taken


def test_core_of_the_identity_is_perfect(
    tiny_model: HookedTransformer, text: datasets.Dataset, tmp_path: Path
) -> None:
    eye = torch.eye(128)
    identity = dictionary(
        torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye]), hook_name="blocks.2.hook_resid_post"
    )
    result = sm.saebench.run(
        identity, tiny_model, tmp_path, evals=["core"], text=text, settings={"core": CORE}
    )["core", 256]
    assert result.space == "input"
    assert result.l0 == pytest.approx(128)
    assert result.metrics["ce_loss_score"] == pytest.approx(1, abs=1e-4)
    assert result.metrics["kl_div_score"] == pytest.approx(1, abs=1e-4)
    assert result.metrics["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert result.metrics["cossim"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip_transcoder"])
def test_core_agrees_with_evaluate_on_the_same_tokens(
    kind: str,
    tiny_model: HookedTransformer,
    text: datasets.Dataset,
    batches: list[torch.Tensor],
    tmp_path: Path,
) -> None:
    if kind == "sae":
        sae = random_dictionary("blocks.2.hook_resid_post", None)
    else:
        sae = random_dictionary(skip=kind == "skip_transcoder")
    sae.cfg.metadata.prepend_bos = False  # no token of the text is special then
    result = sm.saebench.run(sae, tiny_model, tmp_path, evals=["core"], text=text, settings={"core": CORE})
    per_prefix = CORE["n_eval_reconstruction_batches"] + CORE["n_eval_sparsity_variance_batches"]
    assert len(batches) == 2 * per_prefix
    replaced = torch.cat(batches[:2])
    reconstructed = torch.cat(batches[2:4])
    assert not torch.isin(torch.cat(batches), torch.tensor([0, 1, 2])).any()
    everything: Any = {"n_tokens": 10**6, "n_ce_tokens": 10**6, "exclude_special_tokens": False}
    on_replaced = sm.evaluate(sae, tiny_model, replaced, **everything)
    on_reconstructed = sm.evaluate(sae, tiny_model, reconstructed, **everything)
    for level, width in enumerate((16, 64)):
        found = result["core", width]
        assert found.space == ("input" if kind == "sae" else "output")
        ours, reconstruction = on_replaced.prefixes[level], on_reconstructed.prefixes[level]
        assert found.metrics["ce_loss_score"] == pytest.approx(ours.ce_recovered, abs=1e-3)
        assert found.metrics["ce_loss_with_sae"] == pytest.approx(ours.ce, abs=1e-3)
        assert found.metrics["kl_div_with_sae"] == pytest.approx(ours.kl, abs=0.02)
        assert found.metrics["explained_variance"] == pytest.approx(1 - reconstruction.fvu, abs=1e-4)
        assert found.l0 == pytest.approx(reconstruction.l0, abs=1e-3)


@pytest.mark.parametrize("hook_name_out", [None, "blocks.0.hook_resid_post"])
def test_probing_and_tpp_of_one_latent_a_class(
    hook_name_out: str | None, tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    result = sm.saebench.run(
        word_detectors(tiny_model, hook_name_out),
        tiny_model,
        tmp_path,
        evals=["sparse_probing", "tpp"],
        labelled=labelled_words(),
    )
    probing, tpp = result["sparse_probing", 12], result["tpp", 12]
    assert probing.metrics["sae_top_1_test_accuracy"] == pytest.approx(1, abs=0.01)
    assert probing.metrics["llm_test_accuracy"] > 0.95  # type: ignore[operator]
    # 3 of the 9 words of each text, and nothing else, fire one latent
    assert probing.l0 == pytest.approx(1 / 3, abs=0.05)
    # Without its latent a class cannot be told any more: its probe falls towards one half, the others'
    # do not. (In the residual after the block attention has moved some of it to the other words.)
    least = 0.25 if hook_name_out is None else 0.1
    assert tpp.metrics["tpp_threshold_2_total_metric"] > least  # type: ignore[operator]


def test_latents_that_never_fire_are_at_chance(tiny_model: HookedTransformer, tmp_path: Path) -> None:
    silent = word_detectors(tiny_model, "blocks.0.hook_resid_post")
    with torch.no_grad():
        silent.threshold.fill_(1e6)
    result = sm.saebench.run(
        silent, tiny_model, tmp_path, evals=["sparse_probing", "tpp"], labelled=labelled_words()
    )
    assert result["sparse_probing", 12].metrics["sae_top_1_test_accuracy"] == pytest.approx(0.5, abs=0.1)
    assert result["tpp", 12].metrics["tpp_threshold_2_total_metric"] == 0
    assert result["tpp", 12].l0 == 0


def test_tpp_projects_a_transcoders_latents_on_the_target(
    tiny_model: HookedTransformer, tmp_path: Path
) -> None:
    """What the latents write is ablated: with decoder rows of another hook it comes to little."""
    right = word_detectors(tiny_model, "blocks.0.hook_resid_post")
    wrong = word_detectors(tiny_model, "blocks.0.hook_resid_post")
    with torch.no_grad():
        wrong.W_dec[:3] = right.W_dec[[1, 2, 0]]
    scores = [
        sm.saebench.run(sae, tiny_model, tmp_path / name, evals=["tpp"], labelled=labelled_words())[
            "tpp", 12
        ].metrics["tpp_threshold_2_total_metric"]
        for name, sae in (("right", right), ("wrong", wrong))
    ]
    assert scores[0] > scores[1] + 0.05  # type: ignore[operator]


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorption on some of the words of each letter."""
    from sae_bench.evals.absorption import common, feature_absorption

    from tests.saebench.dictionaries import spelling_words

    for module in (common, feature_absorption):
        monkeypatch.setattr(module, "get_alpha_tokens", lambda tokenizer, **_: spelling_words(tokenizer))


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("transcoder", [False, True])
def test_absorption_finds_the_letters_that_were_absorbed(transcoder: bool, tmp_path: Path) -> None:
    speller = Speller()
    scores = {}
    for absorbs in (False, True):
        sae = speller.dictionary(absorbs, transcoder)
        result = sm.saebench.run(
            sae,
            speller.model,
            tmp_path / str(absorbs),
            evals=["absorption"],
            settings={"absorption": ABSORPTION},
            cache=tmp_path / "cache",
        )
        scores[absorbs] = result["absorption", sae.cfg.d_sae].metrics
    share = N_ABSORBED * 26 / len(speller.words)
    assert scores[False]["mean_absorption_fraction_score"] == pytest.approx(0, abs=0.01)
    assert scores[True]["mean_absorption_fraction_score"] == pytest.approx(share, rel=0.6)
    assert scores[True]["mean_full_absorption_score"] > 0.3 * share


def test_absorption_is_skipped_where_the_model_cannot_spell(
    few_words: None,  # noqa: ARG001
    tiny_model: HookedTransformer,
    tmp_path: Path,
) -> None:
    sae = random_dictionary(EMBEDDING.replace("pre", "post"), None)
    result = sm.saebench.run(
        sae, tiny_model, tmp_path, evals=["absorption"], prefixes=[64], settings={"absorption": ABSORPTION}
    )
    assert "first letters in the language model, and 20 are needed" in str(result["absorption", 64].skipped)
    assert result["absorption", 64].metrics == {}
