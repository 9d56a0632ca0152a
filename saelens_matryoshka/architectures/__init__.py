"""What SAELens registers: the training classes and their configs."""

from saelens_matryoshka.architectures.finite import NonFiniteActivationsError
from saelens_matryoshka.architectures.recipe import recommended_runner_fields
from saelens_matryoshka.architectures.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from saelens_matryoshka.architectures.training import MatryoshkaTraining
from saelens_matryoshka.architectures.transcoder import (
    MatryoshkaTrainingSkipTranscoder,
    MatryoshkaTrainingSkipTranscoderConfig,
    MatryoshkaTrainingTranscoder,
    MatryoshkaTrainingTranscoderConfig,
)

__all__ = [
    "MatryoshkaTraining",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "MatryoshkaTrainingSkipTranscoder",
    "MatryoshkaTrainingSkipTranscoderConfig",
    "MatryoshkaTrainingTranscoder",
    "MatryoshkaTrainingTranscoderConfig",
    "NonFiniteActivationsError",
    "recommended_runner_fields",
]
