"""SAEBench on every prefix of a nested SAE or transcoder, and descriptions of its latents.

SAEBench itself is imported when `run` or `describe` is called.
"""

from saelens_matryoshka.saebench.data import LabelledText
from saelens_matryoshka.saebench.describe import describe
from saelens_matryoshka.saebench.descriptions import Description, Descriptions
from saelens_matryoshka.saebench.endpoint import Endpoint, EndpointError, Estimate, Prices
from saelens_matryoshka.saebench.evals import EVALS
from saelens_matryoshka.saebench.result import PrefixEval, SAEBenchResult
from saelens_matryoshka.saebench.run import SAEBenchError, run

__all__ = [
    "EVALS",
    "Description",
    "Descriptions",
    "Endpoint",
    "EndpointError",
    "Estimate",
    "LabelledText",
    "PrefixEval",
    "Prices",
    "SAEBenchError",
    "SAEBenchResult",
    "describe",
    "run",
]
