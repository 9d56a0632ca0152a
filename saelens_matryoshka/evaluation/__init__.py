"""Metrics of every prefix, on held-out tokens."""

from saelens_matryoshka.evaluation.comparison import Comparison, compare
from saelens_matryoshka.evaluation.evaluator import evaluate
from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics

__all__ = ["Comparison", "EvalResult", "PrefixMetrics", "compare", "evaluate"]
