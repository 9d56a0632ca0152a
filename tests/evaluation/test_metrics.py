from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.evaluation.metrics import (
    DENSITY_EDGES,
    FiringCounts,
    NextTokenSums,
    ReconstructionSums,
    decoder_redundancy,
)

CPU = torch.device("cpu")


def test_fvu_is_that_of_its_definition_however_the_tokens_are_batched() -> None:
    target = 100 + torch.randn(500, 6) * torch.tensor([1.0, 10, 1, 1, 1, 0.1])
    predictions = target + torch.randn(2, 500, 6)
    error = (predictions - target).pow(2).sum(dim=(1, 2))
    expected = error / (target - target.mean(dim=0)).pow(2).sum()
    sums = ReconstructionSums(2, 6, CPU)
    for start, stop in ((0, 1), (1, 300), (300, 500)):
        sums.add(target[start:stop], predictions[:, start:stop])
    torch.testing.assert_close(sums.fvu().float(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(sums.mean().float(), target.mean(dim=0))


def test_the_mean_predictor_scores_exactly_one() -> None:
    target = 1e3 + torch.randn(1000, 4).double() * torch.tensor([1.0, 30, 1, 1])
    sums = ReconstructionSums(1, 4, CPU)
    sums.add(target, target.mean(dim=0).expand(1, 1000, 4))
    assert sums.fvu().item() == pytest.approx(1, abs=1e-9)


def test_cosine_and_explained_variance_are_those_of_their_definitions() -> None:
    target = 3 + torch.randn(300, 6)
    predictions = target + torch.randn(2, 300, 6)
    sums = ReconstructionSums(2, 6, CPU)
    for start, stop in ((0, 100), (100, 300)):
        sums.add(target[start:stop], predictions[:, start:stop])
    cosine = torch.nn.functional.cosine_similarity(predictions, target[None], dim=-1).mean(dim=-1)
    torch.testing.assert_close(sums.mean_cosine().float(), cosine)
    assert sums.explained_variance() == pytest.approx((1 - sums.fvu()).tolist(), rel=1e-4)


def test_firing_counts_are_per_prefix() -> None:
    counts = FiringCounts(4, CPU)
    counts.add(torch.tensor([[1.0, 0, 2, 0], [0, 0, 1, 0]]))
    counts.add(torch.tensor([[1.0, 0, 0, 0]]))
    assert counts.l0(2) == pytest.approx(2 / 3)
    assert counts.l0(4) == pytest.approx(4 / 3)
    assert counts.n_dead(2) == 1
    assert counts.n_dead(4) == 2


def test_negative_activations_are_active() -> None:
    counts = FiringCounts(2, CPU)
    counts.add(torch.tensor([[-1.0, 0.0]]))
    assert counts.l0(2) == 1


def test_density_histogram_counts_every_live_latent_of_the_prefix_once() -> None:
    counts = FiringCounts(4, CPU)
    acts = torch.zeros(1000, 4)
    acts[:, 0] = 1  # always
    acts[:5, 1] = 1  # 0.5%
    acts[:5, 2] = 1
    counts.add(acts)
    histogram = counts.density_histogram(4)
    assert len(histogram) == len(DENSITY_EDGES) - 1
    assert histogram[-1] == 1
    assert histogram[DENSITY_EDGES.index(-2.5)] == 2
    assert sum(histogram) == 3
    assert sum(counts.density_histogram(2)) == 2


def test_decoder_redundancy_looks_within_each_prefix() -> None:
    W_dec = torch.eye(6, 8)
    W_dec[3] = 5 * W_dec[0] + 0.1 * W_dec[1]  # parallel to a row of the first prefix
    W_dec[5] = -W_dec[4]  # opposite, which is another direction
    assert decoder_redundancy(W_dec, [3, 6]) == [0, pytest.approx(2 / 6)]


def test_decoder_redundancy_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    W_dec = torch.randn(50, 3)
    whole = decoder_redundancy(W_dec, [7, 20, 50])
    monkeypatch.setattr("saelens_matryoshka.evaluation.metrics._CHUNK_VALUES", 300)
    assert decoder_redundancy(W_dec, [7, 20, 50]) == whole
    assert 0 < whole[1] < 1


def test_next_token_sums_are_cross_entropy_and_kl() -> None:
    logits, clean, labels = torch.randn(700, 9), torch.randn(700, 9), torch.randint(9, (700,))
    sums = NextTokenSums()
    sums.add(logits, clean, labels)
    assert sums.mean_ce() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    p, log_q = clean.softmax(-1), logits.log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1).mean().item()
    assert sums.mean_kl() == pytest.approx(kl, rel=1e-5)
