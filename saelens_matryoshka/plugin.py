"""Registration in SAELens, and the only two places where SAELens itself is redirected.

- `ActivationsStore.from_config`: the runner builds its store here; a transcoder's config gets a paired
  store, and every config of ours is checked against the model and the data first.
- `SAETrainer.fit`: here trainer, SAE, store and evaluator have all been built. A transcoder gets an
  evaluator that knows two hooks and learns the norm's weight it has to fold; all of ours get a progress
  bar that shows what matters.

Both dispatch on the type of the config or the SAE, so nothing changes for SAELens's own architectures.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any

from sae_lens import (
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    SAETrainer,
    llm_sae_training_runner,
    register_sae_training_class,
)
from sae_lens import __version__ as sae_lens_version
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

ARCHITECTURES = (
    (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig),
    (MatryoshkaTrainingTranscoder, MatryoshkaTrainingTranscoderConfig),
    (MatryoshkaTrainingSkipTranscoder, MatryoshkaTrainingSkipTranscoderConfig),
)
_REDIRECTED = "_redirected_by_saelens_matryoshka"


def install() -> None:
    """Register the architectures and redirect the two seams. Calling it again changes nothing.

    Raises:
        ImportError: SAELens has moved a seam.
    """
    for sae_class, cfg_class in ARCHITECTURES:
        if cfg_class.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(cfg_class.architecture(), sae_class, cfg_class)
    _redirect(ActivationsStore, "from_config", ["model", "cfg", "override_dataset"], _from_config)
    _redirect(SAETrainer, "fit", ["self"], _fit)


def _from_config(stock: Callable[..., Any]) -> Any:
    def from_config(
        cls: type[ActivationsStore], model: Any, cfg: Any, override_dataset: Any = None
    ) -> ActivationsStore:
        if isinstance(getattr(cfg, "sae", None), MatryoshkaTrainingConfig):
            return build_store(model, cfg, override_dataset, stock_from_config=stock)
        return stock.__func__(cls, model, cfg, override_dataset)  # type: ignore[attr-defined]

    return classmethod(from_config)


def _fit(stock: Callable[..., Any]) -> Any:
    def fit(self: SAETrainer[Any, Any]) -> Any:
        if isinstance(self.sae, MatryoshkaTraining):
            prepare_trainer(self)
        return stock(self)

    return fit


def parse_runner_config(args: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """SAELens's command-line flags as a runner config; `--help` prints them and exits.

    Raises:
        ValueError: a flag is unknown, or its value is refused.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return llm_sae_training_runner._parse_cfg_args(args)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # argparse has written the usage of some hundred flags, and then what is wrong
        raise ValueError(said.getvalue().rpartition("error: ")[2].strip()) from None


def _redirect(
    owner: type, name: str, parameters: list[str], wrap: Callable[[Callable[..., Any]], Any]
) -> None:
    """Replace `owner.name` by what `wrap` makes of it, once, if it still is what we know."""
    stock = getattr(owner, name, None)
    if getattr(stock, _REDIRECTED, False):
        return
    if stock is None or list(inspect.signature(stock).parameters) != parameters:
        raise ImportError(
            f"SAELens {sae_lens_version} has changed {owner.__name__}.{name}({', '.join(parameters)}), "
            "which saelens_matryoshka builds on. Install the sae-lens version that this release of "
            "saelens-matryoshka asks for, or a newer saelens-matryoshka."
        )
    redirected = wrap(stock)
    function = redirected.__func__ if isinstance(redirected, classmethod) else redirected
    function.__doc__ = stock.__doc__
    setattr(function, _REDIRECTED, True)
    setattr(owner, name, redirected)
