"""Synthetic data whose truth is known: a world for SAEs and one for transcoders.

A *world* is drawn from a seed: directions of the true features, how often they fire, and samples. All
contestants of a seed train on the same samples in the same order.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from sae_lens.synthetic import (
    FiringProbabilityConfig,
    HierarchyConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    register_firing_probability,
    zipfian_firing_probabilities,
)

from saelens_matryoshka.evaluation.ground_truth import TrueBatch, hierarchy_children

_BATCH = 1024
_HELD_OUT_BATCHES = 40


@dataclass(frozen=True)
class World:
    """Samples and their truth."""

    train: torch.Tensor
    """`[n, d]`; for a transcoder `[source | target]`"""
    held_out: list[TrueBatch]
    directions: torch.Tensor
    """of the true features in the target's space, `[n_features, d_out]`"""
    children: Mapping[int, Sequence[int]]
    groups: Mapping[str, Sequence[int]]
    description: str


@dataclass
class TreeFiringProbabilityConfig(FiringProbabilityConfig):
    """Zipf frequencies of the roots and of the features outside trees; children by their parent's.

    The features of the trees come first, their roots first of all, as SAELens numbers them. The roots are
    evenly spread over the ranks of the Zipf law.

    Args:
        n_roots: Roots of trees.
        n_in_trees: Features in trees, roots included.
        child_probability: Of a child to be drawn when its parent fires; of several drawn ones that exclude
            each other one stays.
        exponent: Of the Zipf law.
        max_prob: Of the most frequent feature.
        min_prob: Of the least frequent feature that has no parent.
    """

    n_roots: int
    n_in_trees: int
    child_probability: float = 0.3
    exponent: float = 0.5
    max_prob: float = 0.35
    min_prob: float = 0.01

    @classmethod
    def generator_name(cls) -> str:
        """Name in SAELens's registry."""
        return "trees"

    def generate(self, num_features: int, seed: int | None = None) -> torch.Tensor:  # noqa: ARG002
        """Probabilities `[num_features]`, a child's given that its parent fires."""
        n_independent = self.n_roots + num_features - self.n_in_trees
        zipf = zipfian_firing_probabilities(n_independent, self.exponent, self.max_prob, self.min_prob)
        ranks = torch.arange(n_independent)
        spacing = n_independent // self.n_roots
        is_root = (ranks % spacing == 0) & (ranks // spacing < self.n_roots)
        probabilities = torch.full((num_features,), self.child_probability)
        probabilities[: self.n_roots] = zipf[is_root]
        probabilities[self.n_in_trees :] = zipf[~is_root]
        return probabilities


def sae_world(seed: int, n_samples: int, *, n_roots: int = 40, n_free: int = 120, d: int = 96) -> World:
    """Trees of three generations with mutually exclusive children, three of each parent, and free features.

    Args:
        seed: Of the directions and the samples.
        n_samples: Training samples.
        n_roots: Trees.
        n_free: Features outside trees.
        d: Width of the activations.
    """
    n_in_trees = 13 * n_roots
    model = _quiet_model(
        SyntheticModelConfig(
            num_features=n_in_trees + n_free,
            hidden_dim=d,
            firing_probability=TreeFiringProbabilityConfig(n_roots, n_in_trees),
            hierarchy=HierarchyConfig(
                total_root_nodes=n_roots, branching_factor=3, max_depth=2, mutually_exclusive_portion=1.0
            ),
            orthogonalization=OrthogonalizationConfig(num_steps=100),
            std_firing_magnitudes=0.3,
            bias=0.5,
            seed=seed,
        )
    )
    assert model.hierarchy is not None
    children = hierarchy_children(model.hierarchy)
    roots = range(n_roots)
    second = [child for root in roots for child in children[root]]
    groups = {
        "roots": roots,
        "children": second,
        "grandchildren": [child for parent in second for child in children[parent]],
        "free": range(n_in_trees, n_in_trees + n_free),
    }
    torch.manual_seed(seed)
    held_out = []
    for _ in range(_HELD_OUT_BATCHES):
        x, features = model.sample_with_features(_BATCH)
        held_out.append(TrueBatch(x, x, features))
    train = torch.cat([model.sample(_BATCH) for _ in range(n_samples // _BATCH)])
    return World(
        train,
        held_out,
        model.feature_dict.feature_vectors.detach(),
        children,
        groups,
        f"{n_in_trees + n_free} true features in {d} dimensions: {n_roots} roots, "
        f"{len(second)} children, {9 * n_roots} grandchildren (siblings exclude each other), {n_free} free; "
        "Zipf frequencies",
    )


def transcoder_world(
    seed: int,
    n_samples: int,
    *,
    n_per_kind: int = 64,
    n_gates: int = 8,
    d: int = 96,
) -> World:
    """Pairs whose target is a known sparse function of the source's features.

    The source has features of Zipf frequencies and a few *gates* that fire in 40% of the samples. Every
    term of the target has a direction of its own and one source feature a_i behind it:

    - copy: a_i
    - conjunction: a_i where a gate fires, else 0
    - inhibition: a_i where a gate does not fire, else 0

    A latent that fires with a_i whether or not the gate does is a detector of F1 0.57 of the conjunction and
    0.75 of the inhibition, so it recovers neither.
    """
    n_sources = 3 * n_per_kind
    sources = _quiet_model(
        SyntheticModelConfig(
            num_features=n_sources + n_gates,
            hidden_dim=d,
            firing_probability=_GatedFiringProbabilityConfig(n_gates),
            orthogonalization=OrthogonalizationConfig(num_steps=100),
            std_firing_magnitudes=0.3,
            bias=0.5,
            seed=seed,
        )
    )
    targets = _quiet_model(
        SyntheticModelConfig(
            num_features=n_sources,
            hidden_dim=d,
            orthogonalization=OrthogonalizationConfig(num_steps=100),
            bias=0.5,
            seed=seed + 10_000,
        )
    ).feature_dict
    generator = torch.Generator().manual_seed(seed)
    gate_of = n_sources + torch.randint(n_gates, (n_sources,), generator=generator)
    kind_of = torch.arange(n_sources) % 3  # so that every kind has frequent and rare ones

    @torch.no_grad()
    def sample() -> TrueBatch:
        x, features = sources.sample_with_features(_BATCH)
        gate = features[:, gate_of] > 0
        passes = torch.where(kind_of == 1, gate, torch.where(kind_of == 2, ~gate, True))
        terms = features[:, :n_sources] * passes
        return TrueBatch(x, targets(terms), terms)

    torch.manual_seed(seed)
    held_out = [sample() for _ in range(_HELD_OUT_BATCHES)]
    train = torch.cat([torch.cat(sample()[:2], dim=1) for _ in range(n_samples // _BATCH)])
    kinds = {
        name: (kind_of == kind).nonzero().squeeze(1).tolist()
        for kind, name in enumerate(("copies", "conjunctions", "inhibitions"))
    }
    return World(
        train,
        held_out,
        targets.feature_vectors.detach(),
        {},
        kinds,
        f"{n_sources} source features and {n_gates} gates in {d} dimensions; {n_per_kind} copies, "
        f"{n_per_kind} conjunctions and {n_per_kind} inhibitions, Zipf frequencies",
    )


@dataclass
class _GatedFiringProbabilityConfig(FiringProbabilityConfig):
    n_gates: int
    gate_probability: float = 0.4

    @classmethod
    def generator_name(cls) -> str:
        return "gated"

    def generate(self, num_features: int, seed: int | None = None) -> torch.Tensor:  # noqa: ARG002
        zipf = zipfian_firing_probabilities(num_features - self.n_gates, 0.5, 0.3, 0.01)
        return torch.cat([zipf, torch.full((self.n_gates,), self.gate_probability)])


for _config in (TreeFiringProbabilityConfig, _GatedFiringProbabilityConfig):
    register_firing_probability(_config.generator_name(), _config)


def _quiet_model(cfg: SyntheticModelConfig) -> SyntheticModel:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        return SyntheticModel(cfg)
