"""What the package offers under its own name. Importing this registers the architectures in SAELens."""

from saelens_matryoshka import saebench
from saelens_matryoshka.architectures import (
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    MatryoshkaTrainingSkipTranscoder,
    MatryoshkaTrainingSkipTranscoderConfig,
    MatryoshkaTrainingTranscoder,
    MatryoshkaTrainingTranscoderConfig,
    NonFiniteActivationsError,
    recommended_runner_fields,
)
from saelens_matryoshka.evaluation import Comparison, EvalResult, compare, evaluate
from saelens_matryoshka.plugin import install as _install
from saelens_matryoshka.prefixes import (
    decode_prefixes,
    inference_model,
    matryoshka_widths,
    truncate,
)
from saelens_matryoshka.sites import Site, find_site
from saelens_matryoshka.widths import cumulative_widths

__all__ = [
    "Comparison",
    "EvalResult",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "MatryoshkaTrainingSkipTranscoder",
    "MatryoshkaTrainingSkipTranscoderConfig",
    "MatryoshkaTrainingTranscoder",
    "MatryoshkaTrainingTranscoderConfig",
    "NonFiniteActivationsError",
    "Site",
    "compare",
    "cumulative_widths",
    "decode_prefixes",
    "evaluate",
    "find_site",
    "inference_model",
    "matryoshka_widths",
    "recommended_runner_fields",
    "saebench",
    "truncate",
]

_install()
