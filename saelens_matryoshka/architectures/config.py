"""What a user can set on every Matryoshka architecture, and what is refused before anything is loaded."""

from __future__ import annotations

import contextlib
import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeGuard

import torch
from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import Self, override

from saelens_matryoshka.architectures.recipe import recommended_widths
from saelens_matryoshka.ops import NestedObjective
from saelens_matryoshka.widths import cumulative_widths, plain_numbers

# The auxiliary loss, and a target in another space, are undefined under a per-row normalisation.
_PER_ROW_NORMALISATIONS = ("layer_norm", "constant_norm_rescale")

_DTYPES = [repr(name) for name, dtype in DTYPE_MAP.items() if dtype != torch.float16]


@dataclass
class MatryoshkaTrainingConfig(MatryoshkaBatchTopKTrainingSAEConfig, ABC):
    """Fields shared by Matryoshka SAEs and transcoders: SAELens's own, and a few more.

    Args:
        matryoshka_widths (list[int]): Cumulative widths of the nested levels, or group sizes that add up
            to d_sae (converted to cumulative widths). One entry, `[d_sae]`, is a plain dictionary.
        level_weights (list[float] | None): Weight of each level's reconstruction loss. None: all 1.
        selection (str): "batch" keeps the k·B largest activations of a batch of B rows (BatchTopK),
            "token" the k largest of each row (TopK).
        l1_coefficient (float): Weight of the L1 norm of the activations, each times its decoder norm.
        aux_k (int | None): Dead latents that learn the residual of one row. None: d_out/2, as SAELens.
            So many share the residual that each learns a small part, too small to be selected when it
            has to compete again; few of them learn parts as large as those of the living.
        threshold_calibration (str): Where the threshold of the saved JumpReLU model comes from. "ema":
            moving average of each batch's smallest kept activation, as SAELens does. "l0": tracked so
            that the mean number of activations above it is k; needed with selection="token".
        k (float): Latents kept per row, on average. Inherited from BatchTopKTrainingSAEConfig.
        use_matryoshka_aux_loss (bool): Dead latents learn the residual of their own level. Inherited
            from MatryoshkaBatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Rate of the "ema" threshold. Inherited from BatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Weight of the dead latents' loss. Inherited from
            TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Select by activation times decoder norm. Inherited from
            TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm of the decoder rows at the start. Inherited from
            TrainingSAEConfig.
        d_in (int): Width of the encoder's input. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
        normalize_activations (str): Scaling of the activations in training. Inherited from SAEConfig.
    """

    level_weights: list[float] | None = None
    selection: Literal["batch", "token"] = "batch"
    l1_coefficient: float = 0.0
    aux_k: int | None = None
    threshold_calibration: Literal["ema", "l0"] = "ema"

    @override
    def __post_init__(self) -> None:
        for field in fields(self):
            # numbers like any other, but JSON knows none of them
            setattr(self, field.name, plain_numbers(getattr(self, field.name)))
        require_positive_int("d_in", self.d_in)
        require_positive_int("d_sae", self.d_sae)
        self.matryoshka_widths = cumulative_widths(self.matryoshka_widths, self.d_sae)
        if isinstance(weights := self.level_weights, Sequence) and not isinstance(weights, str):
            self.level_weights = [plain_numbers(weight) for weight in weights]
        for name in (
            "apply_b_dec_to_input",
            "rescale_acts_by_decoder_norm",
            "use_matryoshka_aux_loss",
            "use_sparse_activations",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be True or False.")
        self._check_k()
        self._check_level_weights()
        if self.threshold_calibration not in ("ema", "l0"):
            raise ValueError(f"threshold_calibration={self.threshold_calibration!r} must be 'ema' or 'l0'.")
        if self.selection == "token" and self.threshold_calibration == "ema":
            raise ValueError(
                "threshold_calibration='ema' follows the smallest kept activation of a batch, which with "
                "selection='token' is not a threshold: set threshold_calibration='l0'."
            )
        if self.aux_k is not None:
            require_positive_int("aux_k", self.aux_k)
        for name in ("aux_loss_coefficient", "l1_coefficient"):
            value = getattr(self, name)
            if not (_is_number(value) and value >= 0):
                raise ValueError(f"{name}={value!r} must be a finite number, 0 or larger.")
        norm, rate = self.decoder_init_norm, self.topk_threshold_lr
        if norm is not None and not (_is_number(norm) and norm > 0):
            raise ValueError(f"decoder_init_norm={norm!r} must be a number larger than 0, or None.")
        if not (_is_number(rate) and 0 <= rate <= 1):
            raise ValueError(f"topk_threshold_lr={rate!r} must be a number from 0 to 1.")
        if self.dtype not in DTYPE_MAP:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(_DTYPES)}.")
        if DTYPE_MAP[self.dtype] == torch.float16:
            raise ValueError(
                f"dtype={self.dtype!r}: Adam's second moments underflow in it, and its steps are then far "
                "too large. Use 'bfloat16' or 'float32'; the activations may be float16 (the runner's dtype)."
            )
        _require_device(self.device)
        require_float64("device", self.device)
        if not isinstance(self.metadata, SAEMetadata):
            raise ValueError(
                f"metadata={self.metadata!r} must be an SAEMetadata. Leave it out: the runner fills it in."
            )
        if self.normalize_activations in _PER_ROW_NORMALISATIONS:
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} is not supported: the auxiliary "
                "loss and the thresholds would be in another space than the target. Use 'none' or "
                "'expected_average_only_in'."
            )
        super().__post_init__()

    @classmethod
    def recommended(cls, *, d_in: int, d_sae: int, k: float, **overrides: Any) -> Self:
        """The settings that measure best; see `recommended_runner_fields` for the runner's.

        Args:
            d_in: Width of the encoder's input.
            d_sae: Number of latents.
            k: Latents kept per row, on average.
            **overrides: Any other field. Without `matryoshka_widths`, the levels are 1/16, 1/4, 1/2 and
                all of the latents.

        Raises:
            ValueError: a setting is not possible; the message names it.
        """
        d_sae, k = plain_numbers(d_sae), plain_numbers(k)
        require_positive_int("d_sae", d_sae)
        _require_k(k, d_sae)
        settings = {"matryoshka_widths": recommended_widths(d_sae), **cls._recommended_fields(k)}
        return cls(**{"d_in": d_in, "d_sae": d_sae, "k": k, **settings, **overrides})

    @classmethod
    def _recommended_fields(cls, k: float) -> dict[str, Any]:  # noqa: ARG003
        """What `recommended` sets that is not a default."""
        return {}

    @override
    def add_training_info_to_metadata(self) -> None:
        super().add_training_info_to_metadata()
        self.metadata.matryoshka_widths = list(self.matryoshka_widths)
        if self.selection == "token":
            self.metadata.inference_activation = (
                f"JumpReLU at the threshold that keeps k={self.k:g} latents per token on average; "
                "trained with the k largest of each token"
            )

    # What is written says what the fields are now: they may have been changed since the config was made.

    @override
    def to_dict(self) -> dict[str, Any]:
        self.add_training_info_to_metadata()
        return super().to_dict()

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        self.add_training_info_to_metadata()
        return super().get_inference_sae_cfg_dict()

    def objective(self, *, subtract_b_dec: bool) -> NestedObjective:
        """The loss these settings describe."""
        return NestedObjective(
            widths=tuple(self.matryoshka_widths),
            level_weights=tuple(self.level_weights or [1.0] * len(self.matryoshka_widths)),
            k=self.k,
            selection=self.selection,
            subtract_b_dec=subtract_b_dec,
            rescale_by_decoder_norm=self.rescale_acts_by_decoder_norm,
            aux_coefficient=self.aux_loss_coefficient,
            aux_per_level=self.use_matryoshka_aux_loss,
            aux_k=self.aux_k,
            l1_coefficient=self.l1_coefficient,
        )

    def _check_k(self) -> None:
        if self.selection not in ("batch", "token"):
            raise ValueError(f"selection={self.selection!r} must be 'batch' or 'token'.")
        _require_k(self.k, self.d_sae)
        if self.selection == "token" and self.k != int(self.k):
            raise ValueError(
                f"k={self.k} must be a whole number with selection='token', which keeps k latents of "
                "every token."
            )

    def _check_level_weights(self) -> None:
        weights, n_levels = self.level_weights, len(self.matryoshka_widths)
        if weights is None:
            return
        if not isinstance(weights, Sequence) or not all(_is_number(weight) for weight in weights):
            raise ValueError(f"level_weights={weights!r} must be a list of finite numbers, one per level.")
        if len(weights) != n_levels:
            raise ValueError(
                f"level_weights={weights} has {len(weights)} entries for the {n_levels} levels of "
                f"matryoshka_widths={self.matryoshka_widths}: give one per level."
            )
        if not all(weight >= 0 for weight in weights) or sum(weights) == 0:
            raise ValueError(f"level_weights={weights} must be 0 or larger, and not all 0.")


def _require_k(k: object, d_sae: int) -> None:
    if not (_is_number(k) and 0 < k <= d_sae):
        said = f"{k:g}" if _is_number(k) else repr(k)
        raise ValueError(
            f"k={said} must be a number larger than 0 and at most d_sae={d_sae}: it is the number of latents "
            "kept per token."
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_device(device: object) -> None:
    if isinstance(device, str | torch.device):
        with contextlib.suppress(RuntimeError):
            torch.device(device)
            return
    raise ValueError(f"device={device!r} is no device: cpu, cuda or cuda:0.")


def require_float64(name: str, device: str) -> None:
    """Check that a device has the float64 that the threshold is kept in.

    Raises:
        ValueError: it is Apple's GPU.
    """
    if str(device).partition(":")[0] == "mps":
        raise ValueError(
            f"{name}={device!r}: the threshold is kept in float64, which Apple's GPUs do not have. Train on "
            "device='cpu'; the language model may run on llm_device='mps'."
        )


def require_positive_int(name: str, value: object) -> None:
    """Check that a field is a whole number, and at least 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a positive integer.")
