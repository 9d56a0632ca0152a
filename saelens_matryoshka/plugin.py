"""Registration in SAELens, and the three places where SAELens itself is redirected for good.

- `ActivationsStore.from_config`: the runner builds its store here; configs of ours get a store that can be
  continued, a transcoder's a paired one, and every one is checked against the model and the data first.
- `SAETrainer.fit`: here trainer, SAE, store and evaluator have all been built. Ours get an evaluator that
  knows prefixes, two hooks and held-out prompts, a fused Adam and a progress bar that shows what matters; a
  transcoder learns the norm's weight it has to fold.
- `MultiSAETrainingRunnerConfig`: it has one hook per SAE, so a transcoder is refused there, before its runner
  loads a language model.

All dispatch on the type of the config or the SAE, so nothing changes for SAELens's own architectures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sae_lens import (
    ActivationsStore,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    register_sae_training_class,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_matryoshka.architectures import (
    MatryoshkaTraining,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    MatryoshkaTrainingSkipTranscoder,
    MatryoshkaTrainingSkipTranscoderConfig,
    MatryoshkaTrainingTranscoder,
    MatryoshkaTrainingTranscoderConfig,
)
from saelens_matryoshka.architectures.config import MatryoshkaTrainingConfig
from saelens_matryoshka.runner import build_store, prepare_trainer
from saelens_matryoshka.seams import redirect
from saelens_matryoshka.store.resumable import ResumableStore

ARCHITECTURES = (
    (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig),
    (MatryoshkaTrainingTranscoder, MatryoshkaTrainingTranscoderConfig),
    (MatryoshkaTrainingSkipTranscoder, MatryoshkaTrainingSkipTranscoderConfig),
)


def install() -> None:
    """Register the architectures and redirect the three seams. Calling it again changes nothing.

    Raises:
        ImportError: SAELens has moved a seam.
    """
    for sae_class, cfg_class in ARCHITECTURES:
        if cfg_class.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(cfg_class.architecture(), sae_class, cfg_class)
    redirect(ActivationsStore, "from_config", ["model", "cfg", "override_dataset"], _from_config)
    redirect(SAETrainer, "fit", ["self"], _fit)
    redirect(MultiSAETrainingRunnerConfig, "__post_init__", ["self"], _post_init)


def _from_config(stock: Callable[..., Any]) -> Any:
    unbound: Callable[..., Any] = stock.__func__  # type: ignore[attr-defined]

    def from_config(
        cls: type[ActivationsStore], model: Any, cfg: Any, override_dataset: Any = None
    ) -> ActivationsStore:
        if isinstance(getattr(cfg, "sae", None), MatryoshkaTrainingConfig):
            resumable = functools.partial(unbound, ResumableStore)
            return build_store(model, cfg, override_dataset, stock_from_config=resumable)
        return unbound(cls, model, cfg, override_dataset)

    return classmethod(from_config)


def _fit(stock: Callable[..., Any]) -> Any:
    def fit(self: SAETrainer[Any, Any]) -> Any:
        if isinstance(self.sae, MatryoshkaTraining):
            prepare_trainer(self)
        return stock(self)

    return fit


def _post_init(stock: Callable[..., None]) -> Any:
    def __post_init__(self: MultiSAETrainingRunnerConfig) -> None:
        stock(self)
        for name, sae in self.saes.items():
            if isinstance(sae, MatryoshkaTrainingTranscoderConfig):
                raise ValueError(
                    f"saes[{name!r}] is a transcoder, and SAELens's MultiSAETrainingRunner gives each SAE "
                    "one hook. saelens_matryoshka.layers.train_layers trains several together."
                )

    return __post_init__
