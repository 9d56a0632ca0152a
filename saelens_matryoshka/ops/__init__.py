"""The nested training step as pure functions."""

from saelens_matryoshka.ops.group import ALONE, Group
from saelens_matryoshka.ops.reference import nested_decode
from saelens_matryoshka.ops.reference import nested_step as reference_step
from saelens_matryoshka.ops.sparse import SparseStep
from saelens_matryoshka.ops.step import NestedObjective, NestedStep, NestedStepFn, NestedWeights

__all__ = [
    "ALONE",
    "Group",
    "NestedObjective",
    "NestedStep",
    "NestedStepFn",
    "NestedWeights",
    "SparseStep",
    "nested_decode",
    "reference_step",
]
