"""The settings that measure best, in one place.

Those of the dictionary are `…Config.recommended(...)`, and a transcoder's defaults. Learning rate, schedule
and the window after which a silent latent counts as dead belong to SAELens's runner config:
`recommended_runner_fields` gives them. `benchmarks/RESULTS.md` has the measurements.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

# Adam moves every weight by about lr a step, and the weights of a row of unit norm are about 1/√d: so the lr
# that turns a row by the same angle falls with √d. Measured at d 96 and 128, in runs of 400 to 1500 steps.
_LR_TIMES_ROOT_D = 0.08
_ADAM_BETA1 = 0.8
_WARM_UP_PART = 0.03
_DECAY_PART = 0.3
_DEAD_PART = 0.02
_LEAST_DEAD_WINDOW = 25
_PARTS = (16, 4, 2, 1)


def recommended_widths(d_sae: int) -> list[int]:
    """Four levels: 1/16, 1/4, 1/2 and all of the latents."""
    return sorted({max(1, d_sae // part) for part in _PARTS})


def recommended_runner_fields(
    sae: Any, *, training_tokens: int, train_batch_size_tokens: int
) -> dict[str, Any]:
    """Fields of SAELens's runner config that go with the recommended settings.

        sae = sm.MatryoshkaTrainingSAEConfig.recommended(d_in=768, d_sae=12288, k=64)
        size = {"training_tokens": 200_000_000, "train_batch_size_tokens": 4096}
        cfg = LanguageModelSAERunnerConfig(sae=sae, **size, **sm.recommended_runner_fields(sae, **size), ...)

    Args:
        sae: Config of the SAE or transcoder.
        training_tokens: Of the whole run.
        train_batch_size_tokens: Per step.

    Returns:
        lr, adam_beta1, and in steps lr_warm_up_steps, lr_decay_steps and dead_feature_window.

    Raises:
        ValueError: an argument is not what it has to be.
    """
    for name, value in (
        ("training_tokens", training_tokens),
        ("train_batch_size_tokens", train_batch_size_tokens),
    ):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive number of tokens, an integer.")
    if not isinstance(getattr(sae, "d_in", None), int):
        raise ValueError(f"sae={sae!r} must be the config of an SAE or transcoder.")
    n_steps = max(training_tokens // train_batch_size_tokens, 1)
    return {
        "lr": float(f"{_LR_TIMES_ROOT_D / sae.d_in**0.5:.1g}"),
        "adam_beta1": _ADAM_BETA1,
        "lr_warm_up_steps": int(_WARM_UP_PART * n_steps),
        "lr_decay_steps": int(_DECAY_PART * n_steps),
        "dead_feature_window": max(int(_DEAD_PART * n_steps), _LEAST_DEAD_WINDOW),
    }
