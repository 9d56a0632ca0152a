"""How much of a known truth a dictionary has found: metrics on synthetic data whose features are known.

A *true feature* has a direction in the target's space and either fires or not. MCC, uniqueness and F1 are
SAELens's own (`sae_lens.synthetic`). What is added here speaks of single features. Each true feature is
given at most one latent, so that the cosines of the pairs add up to the most (the matching of MCC, with
signs); then

- a feature is **found** if its latent's decoder row has a cosine of at least 0.8 with its direction, and
  **recovered** if that latent also fires when the feature does, with an F1 of at least 0.8;
- **absorption** is how often the latent of a found parent is silent although one of the parent's children,
  which imply it, fires. The latents of the children have then taken over ("A is for Absorption",
  arXiv 2409.14507). A latent may also be silent for want of recall, so the same share when the parent fires
  without any child is reported beside it: the difference is what the children do;
- a found feature **lands** in the level of its latent, the narrowest prefix that contains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from sae_lens.synthetic import (
    ClassificationMetricsCalculator,
    Hierarchy,
    HierarchyNode,
    cosine_similarities,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from scipy.optimize import linear_sum_assignment

from saelens_matryoshka.evaluation.metrics import FiringCounts, ReconstructionSums
from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths, predict_prefixes
from saelens_matryoshka.widths import latent_levels

MIN_COSINE = 0.8
MIN_F1 = 0.8


class TrueBatch(NamedTuple):
    """Samples with their truth."""

    source: torch.Tensor
    """`[n, d_in]`"""
    target: torch.Tensor
    """`[n, d_out]`; the source itself for an SAE"""
    features: torch.Tensor
    """`[n, n_features]`, larger than 0 where a true feature fires"""


@dataclass(frozen=True)
class GroupMetrics:
    """What was found of one group of true features."""

    n_features: int
    """true features in the group"""
    n_found: int
    """those with a latent of their direction"""
    n_recovered: int
    """those with a latent of their direction that fires when they do"""
    mean_f1: float
    """F1 of each feature's own latent as its detector, mean over the group; 0 for a feature without one"""
    landing: list[int]
    """found features per level, narrowest first"""


@dataclass(frozen=True)
class GroundTruthResult:
    """Metrics of one SAE or transcoder, as the inference (JumpReLU) model."""

    mcc: float
    """mean absolute cosine of the one-to-one matching of decoder rows and directions (SAELens's)"""
    f1: float
    """mean over latents of the F1 of each for its nearest feature, by absolute cosine (SAELens's); a dead
    latent counts 0"""
    precision: float
    """of the same"""
    recall: float
    """of the same"""
    uniqueness: float
    """distinct nearest features per latent (SAELens's)"""
    n_features: int
    """true features"""
    n_recovered: int
    """true features with a latent of their direction that fires when they do"""
    absorption: float | None
    """how often a found parent's latent is silent while a child fires; None without hierarchy"""
    silent_alone: float | None
    """how often it is silent while the parent fires without children"""
    n_parents: int
    """features with children"""
    n_parents_found: int
    """the parents behind absorption and silent_alone"""
    fvu: list[float]
    """Σ‖y - ŷ‖² / Σ‖y - ȳ‖² of every prefix, narrowest first"""
    l0: float
    """active latents per sample"""
    true_l0: float
    """true features that fire per sample"""
    n_dead: int
    """latents that never fired on these samples"""
    groups: dict[str, GroupMetrics]
    """by name of the group"""
    n_samples: int
    """samples behind all of it"""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """`to_dict` as indented JSON, with null for NaN."""
        return dumps(self.to_dict(), indent=2)


class CoFiring:
    """How often latents and true features fire, alone and together."""

    def __init__(self, d_sae: int, n_features: int, device: torch.device) -> None:
        self.n_samples = 0
        self.latents = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.features = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.together = torch.zeros(d_sae, n_features, dtype=torch.float64, device=device)

    def add(self, latents: torch.Tensor, features: torch.Tensor) -> None:
        """Add n samples: booleans `[n, d_sae]` of what fires, and `[n, n_features]`."""
        self.n_samples += len(latents)
        self.latents += latents.sum(dim=0)
        self.features += features.sum(dim=0)
        self.together += latents.float().T @ features.float()

    def f1(self) -> torch.Tensor:
        """`[d_sae, n_features]`: F1 of each latent as a detector of each feature."""
        total = self.latents[:, None] + self.features
        return 2 * self.together / total.clamp(min=1)


class Matching(NamedTuple):
    """The latent of each true feature."""

    latent: torch.Tensor
    """`[n_features]`, -1 for a feature that got none"""
    cosine: torch.Tensor
    """`[n_features]`, of the latent's decoder row with the feature's direction; -1 without a latent"""

    @property
    def found(self) -> torch.Tensor:
        """Mask `[n_features]`: the latent has the feature's direction."""
        return self.cosine >= MIN_COSINE


def match_features(W_dec: torch.Tensor, directions: torch.Tensor) -> Matching:
    """Give each true feature at most one latent, so that the cosines add up to the most.

    Args:
        W_dec: `[d_sae, d_out]`.
        directions: `[n_features, d_out]`.
    """
    cosines = cosine_similarities(W_dec, directions).cpu()
    latents, features = map(torch.from_numpy, linear_sum_assignment(cosines.numpy(), maximize=True))
    latent = torch.full((len(directions),), -1)
    cosine = torch.full((len(directions),), -1.0)
    latent[features], cosine[features] = latents, cosines[latents, features]
    return Matching(latent, cosine)


class _Silence(NamedTuple):
    with_child: float | None
    alone: float | None


def silence_of_parents(
    matching: Matching, cofiring: CoFiring, alone: CoFiring, children: Mapping[int, Sequence[int]]
) -> _Silence:
    """How often the latents of found parents are silent: while a child fires, and while none does.

    Both are shares of firings, so a frequent parent counts for more than a rare one. A sample in which
    several children of one parent fire counts once for each.

    Args:
        matching: Latent of each feature.
        cofiring: Of the latents and the features.
        alone: Of the latents and the features when none of their children fires.
        children: The children of each parent.
    """
    found = [parent for parent in children if matching.found[parent]]

    def silent_share(sums: CoFiring, features_of: Mapping[int, Sequence[int]]) -> float | None:
        fired = silent = 0.0
        for parent in found:
            features = list(features_of[parent])
            total = sums.features[features].sum().item()
            fired += total
            silent += total - sums.together[matching.latent[parent], features].sum().item()
        return silent / fired if fired else None

    itself = {parent: [parent] for parent in found}
    return _Silence(silent_share(cofiring, children), silent_share(alone, itself))


@torch.no_grad()
def evaluate_ground_truth(
    sae: SAE[Any],
    batches: Iterable[TrueBatch],
    directions: torch.Tensor,
    *,
    children: Mapping[int, Sequence[int]] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> GroundTruthResult:
    """Compare a dictionary with the truth behind its data.

    Args:
        sae: An SAE or transcoder of SAELens, trained or loaded; evaluated as its inference model.
        batches: Samples it was not trained on.
        directions: Of the true features in the target's space, `[n_features, d_out]`.
        children: The children of each parent, by index of the feature; a child never fires without its
            parent. See `hierarchy_children`.
        groups: Features to report on separately, by name.
    """
    model, children = inference_model(sae), children or {}
    W_dec, widths = model.W_dec.detach(), matryoshka_widths(model)
    d_sae, n_features, device = len(W_dec), len(directions), W_dec.device
    cofiring, alone = (CoFiring(d_sae, n_features, device) for _ in range(2))
    firing = FiringCounts(d_sae, device)
    errors = ReconstructionSums(len(widths), directions.shape[1], device)
    classification = ClassificationMetricsCalculator(W_dec, directions)
    for source, target, features in batches:
        acts, fires = model.encode(source), features > 0
        cofiring.add(acts > 0, fires)
        if children:
            alone.add(acts > 0, _without_children(fires, children))
        firing.add(acts)
        errors.add(target, predict_prefixes(model, source, acts))
        classification.add_batch(acts, features)
    matching = match_features(W_dec, directions)
    own_f1 = _own_f1(matching, cofiring)
    recovered = matching.found & (own_f1 >= MIN_F1)
    levels = latent_levels(widths, device=torch.device("cpu"))
    silence = silence_of_parents(matching, cofiring, alone, children)
    scores = classification.compute()
    return GroundTruthResult(
        mcc=mean_correlation_coefficient(W_dec, directions),
        f1=scores.f1_score,
        precision=scores.precision,
        recall=scores.recall,
        uniqueness=feature_uniqueness(W_dec, directions),
        n_features=n_features,
        n_recovered=int(recovered.sum()),
        absorption=silence.with_child,
        silent_alone=silence.alone,
        n_parents=len(children),
        n_parents_found=int(matching.found[list(children)].sum()),
        fvu=errors.fvu().tolist(),
        l0=firing.l0(d_sae),
        true_l0=cofiring.features.sum().item() / cofiring.n_samples,
        n_dead=firing.n_dead(d_sae),
        groups={
            name: _group(list(members), matching, recovered, own_f1, levels, len(widths))
            for name, members in (groups or {}).items()
        },
        n_samples=cofiring.n_samples,
    )


def hierarchy_children(hierarchy: Hierarchy) -> dict[int, list[int]]:
    """The children of each parent of SAELens's hierarchy, by index of the feature."""
    found: dict[int, list[int]] = {}

    def visit(node: HierarchyNode) -> None:
        children = [child.feature_index for child in node.children if child.feature_index is not None]
        if node.feature_index is not None and children:
            found[node.feature_index] = children
        for child in node.children:
            visit(child)

    for root in hierarchy.roots:
        visit(root)
    return found


def _without_children(fires: torch.Tensor, children: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """`fires` with every parent cleared where one of its children fires."""
    alone = fires.clone()
    for parent, its_children in children.items():
        alone[:, parent] &= ~fires[:, list(its_children)].any(dim=1)
    return alone


def _own_f1(matching: Matching, cofiring: CoFiring) -> torch.Tensor:
    f1 = cofiring.f1().cpu()
    own = f1[matching.latent, torch.arange(f1.shape[1])]
    return torch.where(matching.latent >= 0, own, 0.0)


def _group(
    members: list[int],
    matching: Matching,
    recovered: torch.Tensor,
    own_f1: torch.Tensor,
    levels: torch.Tensor,
    n_levels: int,
) -> GroupMetrics:
    found = matching.found[members]
    landed = levels[matching.latent[members][found]]
    return GroupMetrics(
        n_features=len(members),
        n_found=int(found.sum()),
        n_recovered=int(recovered[members].sum()),
        mean_f1=own_f1[members].mean().item(),
        landing=torch.bincount(landed, minlength=n_levels).tolist(),
    )
