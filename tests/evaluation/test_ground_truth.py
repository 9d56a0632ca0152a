from __future__ import annotations

import dataclasses

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import Hierarchy, HierarchyNode

from saelens_matryoshka.evaluation.ground_truth import (
    CoFiring,
    GroundTruthResult,
    TrueBatch,
    evaluate_ground_truth,
    hierarchy_children,
    match_features,
)

# Four true features along the axes; 1 and 2 are children of 0.
DIRECTIONS = torch.eye(4)
CHILDREN = {0: [1, 2]}
GROUPS = {"parents": [0], "children": [1, 2], "free": [3]}
FEATURES = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0],
        [1.0, 1.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def _sae(W_enc: torch.Tensor, W_dec: torch.Tensor, widths: list[int], threshold: float = 0.5) -> JumpReLUSAE:
    d_sae = len(W_dec)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=4, d_sae=d_sae, apply_b_dec_to_input=False))
    sae.W_enc.data, sae.W_dec.data = W_enc.clone(), W_dec.clone()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    sae.threshold.data.fill_(threshold)
    sae.cfg.metadata.matryoshka_widths = widths
    return sae


def _evaluate(sae: JumpReLUSAE, features: torch.Tensor = FEATURES) -> GroundTruthResult:
    x = features @ DIRECTIONS
    batches = [TrueBatch(x[:2], x[:2], features[:2]), TrueBatch(x[2:], x[2:], features[2:])]
    return evaluate_ground_truth(sae, batches, DIRECTIONS, children=CHILDREN, groups=GROUPS)


def test_the_truth_itself_scores_perfectly() -> None:
    result = _evaluate(_sae(torch.eye(4), torch.eye(4), [1, 3, 4]))
    assert result.mcc == pytest.approx(1)
    assert result.f1 == pytest.approx(1)
    assert result.uniqueness == 1
    assert result.n_recovered == result.n_features == 4
    assert result.absorption == result.silent_alone == 0
    assert (result.n_parents, result.n_parents_found) == (1, 1)
    assert result.fvu[-1] == pytest.approx(0, abs=1e-6)
    assert result.l0 == result.true_l0 == pytest.approx(9 / 5)
    assert result.n_dead == 0


def test_features_land_in_the_narrowest_prefix_that_holds_their_latent() -> None:
    order = [1, 0, 3, 2]  # latent j is feature order[j]
    result = _evaluate(_sae(torch.eye(4)[:, order], torch.eye(4)[order], [1, 3, 4]))
    assert result.groups["parents"].landing == [0, 1, 0]
    assert result.groups["children"].landing == [1, 0, 1]
    assert result.groups["free"].landing == [0, 1, 0]


def test_absorption_is_the_share_of_children_that_fire_while_the_parents_latent_is_silent() -> None:
    """The latent of feature 1 takes over from that of feature 0, which inhibits itself there."""
    W_enc, W_dec = torch.eye(4), torch.eye(4)
    W_enc[1, 0] = -1.0
    W_dec[1, 0] = 0.5
    result = _evaluate(_sae(W_enc, W_dec, [4]))
    assert result.absorption == pytest.approx(2 / 3)  # feature 1 fires twice, feature 2 once
    assert result.silent_alone == 0
    # the latent of 0 fires in 2 of 4 firings of its feature: recall 1/2, precision 1
    assert result.groups["parents"].mean_f1 == pytest.approx(2 / 3)
    assert result.groups["parents"].n_found == 1
    assert result.groups["parents"].n_recovered == 0
    assert result.n_recovered == 3


def test_a_latent_that_is_silent_for_want_of_recall_is_so_without_children_too() -> None:
    W_enc = torch.eye(4)
    W_enc[0, 0] = 0.1
    result = _evaluate(_sae(W_enc, torch.eye(4), [4]))
    assert result.absorption == result.silent_alone == 1
    assert result.n_dead == 1


def test_a_parent_without_a_latent_is_not_counted_as_absorbed() -> None:
    result = _evaluate(_sae(torch.eye(4)[:, 1:], torch.eye(4)[1:], [3]))
    assert result.n_parents_found == 0
    assert result.absorption is None
    assert result.silent_alone is None
    assert result.n_recovered == 3


def test_no_absorption_without_a_hierarchy() -> None:
    batch = TrueBatch(FEATURES, FEATURES, FEATURES)
    result = evaluate_ground_truth(_sae(torch.eye(4), torch.eye(4), [4]), [batch], DIRECTIONS)
    assert result.absorption is None
    assert result.n_parents == 0
    assert result.groups == {}


def test_each_feature_gets_a_latent_of_its_own() -> None:
    """Two latents point nearest to feature 0; only one of them can be its own."""
    W_dec = torch.tensor([[1.0, 0.1, 0.0, 0.0], [0.9, 0.4, 0.0, 0.0]])
    matching = match_features(W_dec, DIRECTIONS[:3])
    assert matching.latent.tolist() == [0, 1, -1]
    assert matching.found.tolist() == [True, False, False]


def test_the_opposite_direction_is_not_a_feature() -> None:
    matching = match_features(-torch.eye(4), DIRECTIONS)
    assert not matching.found.any()
    result = _evaluate(_sae(torch.eye(4), -torch.eye(4), [4]))
    assert (result.mcc, result.f1, result.n_recovered) == (1, 1, 0), "MCC and F1 do not look at signs"


def test_f1_of_every_latent_for_every_feature() -> None:
    cofiring = CoFiring(2, 2, torch.device("cpu"))
    latents = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 0]]).bool()
    features = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]]).bool()
    for rows in (slice(0, 3), slice(3, 4)):
        cofiring.add(latents[rows], features[rows])
    # latent 0 with feature 0: precision 2/3, recall 2/3
    torch.testing.assert_close(cofiring.f1(), torch.tensor([[2 / 3, 0.5], [0.5, 1.0]]).double())


def test_a_transcoders_features_are_in_the_targets_space() -> None:
    sae = _sae(torch.eye(4), torch.eye(4)[[2, 3, 0, 1]], [4])
    target = FEATURES @ DIRECTIONS[[2, 3, 0, 1]]
    result = evaluate_ground_truth(
        sae, [TrueBatch(FEATURES, target, FEATURES)], DIRECTIONS[[2, 3, 0, 1]], groups={"all": [0, 1, 2, 3]}
    )
    assert result.n_recovered == 4
    assert result.fvu[-1] == pytest.approx(0, abs=1e-6)


def test_the_hierarchy_of_saelens_is_read_by_feature_index() -> None:
    leaf = HierarchyNode(feature_index=4)
    nameless = HierarchyNode(children=[HierarchyNode(feature_index=5)])
    middle = HierarchyNode(feature_index=2, children=[leaf])
    root = HierarchyNode(feature_index=0, children=[middle, HierarchyNode(feature_index=3)])
    assert hierarchy_children(Hierarchy([root, nameless], None)) == {0: [2, 3], 2: [4]}


def test_result_is_plain_numbers() -> None:
    result = _evaluate(_sae(torch.eye(4), torch.eye(4), [4]))
    assert result.to_dict() == dataclasses.asdict(result)
    assert '"landing"' in result.to_json()
