"""Matryoshka transcoders: "matryoshka_transcoder" and "matryoshka_skip_transcoder".

A transcoder maps one tensor of the language model (the source, e.g. the MLP's input) to another (the
target, e.g. what the MLP adds to the residual stream). SAELens's trainer carries one tensor per batch, so
a transcoder's batch is `[source | target]`, packed along the last dimension: `[B, d_in + d_out]`.

Three spaces meet here. The hook gives *raw* activations. With `input_gain="norm_weight"` the paired store
multiplies them by the norm's weight, so the *source* a transcoder trains on is the MLP's true input. With
`normalize_activations="expected_average_only_in"` source and target are each scaled to an expected norm of
√d for the *training step*. What is saved reads the raw hook and predicts the raw target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens import (
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
    SAEConfig,
)
from sae_lens.saes.topk_sae import act_times_W_dec
from torch import nn
from typing_extensions import override

from saelens_matryoshka.architectures.config import MatryoshkaTrainingConfig, require_positive_int
from saelens_matryoshka.architectures.training import MatryoshkaTraining
from saelens_matryoshka.ops import NestedWeights


@dataclass
class MatryoshkaTrainingTranscoderConfig(MatryoshkaTrainingConfig):
    """Configuration of a Matryoshka transcoder.

    Args:
        hook_name_out (str): Hook of the target. The source is the runner config's hook_name.
        d_out (int | None): Width of the target. None: d_in.
        input_gain (str): "norm_weight" trains on the MLP's true input when the source is a norm's
            `hook_normalized`: times the norm's weight, plus its bias if it has one. The gain is folded
            away on saving, so the saved transcoder reads `hook_normalized`. "none": the hook as it is.
        threshold_calibration (str): As in MatryoshkaTrainingConfig, "l0" by default here.
        rescale_acts_by_decoder_norm (bool): As in MatryoshkaTrainingConfig, False by default here.
        decoder_init_norm (float | None): As in MatryoshkaTrainingConfig, 0.3 by default here.
        apply_b_dec_to_input (bool): Always False: b_dec lives in the target's space.

    All other fields are those of `saelens_matryoshka.architectures.config.MatryoshkaTrainingConfig`, whose
    help explains them.
    """

    apply_b_dec_to_input: bool = False
    threshold_calibration: Literal["ema", "l0"] = "l0"
    rescale_acts_by_decoder_norm: bool = False
    decoder_init_norm: float | None = 0.3
    hook_name_out: str = ""
    d_out: int | None = None
    input_gain: Literal["none", "norm_weight"] = "none"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_transcoder"

    @override
    def __post_init__(self) -> None:
        if self.d_out is None:
            self.d_out = self.d_in
        if not isinstance(self.hook_name_out, str):
            raise ValueError(
                f"hook_name_out={self.hook_name_out!r} must be the name of a hook, e.g. "
                "'blocks.8.hook_mlp_out'."
            )
        if not self.hook_name_out:
            raise ValueError(
                "hook_name_out is empty: name the hook of the transcoder's target, e.g. "
                "hook_name_out='blocks.8.hook_mlp_out'. (The source is the runner's hook_name.)"
            )
        if self.apply_b_dec_to_input:
            raise ValueError(
                "apply_b_dec_to_input=True is not possible in a transcoder: b_dec lives in the target's "
                "space. Leave it False."
            )
        if self.input_gain not in ("none", "norm_weight"):
            raise ValueError(f"input_gain={self.input_gain!r} must be 'none' or 'norm_weight'.")
        if self.normalize_activations == "covariance_whitening":
            raise ValueError(
                "normalize_activations='covariance_whitening' would mix source and target of a "
                "transcoder's packed batch. Use 'none' or 'expected_average_only_in'."
            )
        super().__post_init__()
        require_positive_int("d_out", self.d_out)

    @override
    def add_training_info_to_metadata(self) -> None:
        super().add_training_info_to_metadata()
        self.metadata.hook_name_out = self.hook_name_out

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


@dataclass
class MatryoshkaTrainingSkipTranscoderConfig(MatryoshkaTrainingTranscoderConfig):
    """Configuration of a Matryoshka transcoder with a linear skip from source to target.

    All fields are those of `MatryoshkaTrainingTranscoderConfig`.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_skip_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSkipTranscoderConfig


class MatryoshkaTrainingTranscoder(MatryoshkaTraining):
    """A transcoder whose every prefix predicts the target on its own.

    `encode`, `decode` and `forward` read and predict what the training step sees: the source (after the
    gain) and the target.
    """

    cfg: MatryoshkaTrainingTranscoderConfig  # type: ignore[assignment]
    config_class = MatryoshkaTrainingTranscoderConfig
    source_scale: torch.Tensor
    target_scale: torch.Tensor
    gain: torch.Tensor
    offset: torch.Tensor

    def __init__(self, cfg: MatryoshkaTrainingTranscoderConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        device = self.W_enc.device
        for name in ("source_scale", "target_scale"):
            self.register_buffer(name, torch.ones((), dtype=torch.double, device=device))
        if cfg.input_gain == "norm_weight":
            # NaN until `set_input_gain`: weights saved without it would be silently wrong.
            unknown = torch.full((cfg.d_in,), torch.nan, dtype=torch.float32, device=device)
            self.register_buffer("gain", unknown)
            self.register_buffer("offset", unknown.clone())

    @property
    def d_out(self) -> int:
        """Width of the target."""
        assert self.cfg.d_out is not None  # set in the config's __post_init__
        return self.cfg.d_out

    @override
    def initialize_weights(self) -> None:
        """Random decoder directions of norm `decoder_init_norm`, independent encoder directions."""
        cfg, place = self.cfg, {"dtype": self.dtype, "device": self.device}
        norm = 1.0 if cfg.decoder_init_norm is None else cfg.decoder_init_norm
        W_dec = torch.randn(cfg.d_sae, self.d_out, **place)
        W_enc = torch.randn(cfg.d_sae, cfg.d_in, **place)
        self.W_dec = nn.Parameter(norm * W_dec / W_dec.norm(dim=-1, keepdim=True))
        self.W_enc = nn.Parameter((norm * W_enc / W_enc.norm(dim=-1, keepdim=True)).T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **place))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **place))

    @torch.no_grad()
    def set_input_gain(self, gain: torch.Tensor, offset: torch.Tensor | None = None) -> None:
        """Tell the transcoder what its source is multiplied by, so that saving can fold it away.

        The stock runner does this by itself.

        Args:
            gain: Weight of the norm, `[d_in]`.
            offset: Bias of the norm, `[d_in]`, if it has one.
        """
        if self.cfg.input_gain != "norm_weight":
            raise ValueError("set_input_gain needs a config with input_gain='norm_weight'.")
        for name, values in (("weight", gain), ("bias", offset)):
            if values is None and name == "bias":
                continue
            if not isinstance(values, torch.Tensor):
                raise ValueError(f"The norm's {name} is a {type(values).__name__}, and must be a tensor.")
            if values.shape != (self.cfg.d_in,):
                raise ValueError(
                    f"The norm's {name} has shape {tuple(values.shape)}, but d_in={self.cfg.d_in}."
                )
        self.gain.copy_(gain)
        self.offset.copy_(torch.zeros_like(gain) if offset is None else offset)

    # ---- training

    @override
    def split_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.cfg.d_in + self.d_out
        if batch.shape[-1] != width:
            raise ValueError(
                f"A transcoder's batch is [source | target] with d_in + d_out = {width} columns, but "
                f"this one has {batch.shape[-1]}. Train with SAELens's LanguageModelSAETrainingRunner, "
                "several at once with saelens_matryoshka.layers.train_layers, or concatenate the pairs "
                "yourself."
            )
        source, target = batch.to(self.dtype).split([self.cfg.d_in, self.d_out], dim=-1)
        if self.cfg.normalize_activations == "expected_average_only_in":
            source = source * self.source_scale.to(source.dtype)
            target = target * self.target_scale.to(target.dtype)
        return source, target

    @override
    @torch.no_grad()
    def prepare_for_training(self, batch: torch.Tensor) -> None:
        """Scales from the first batch, and biases that start where the data is.

        SAELens's trainer has already multiplied the packed batch by one factor; source and target get one
        more each. b_dec starts at the target's mean and b_enc at minus the mean pre-activation, so that
        the latents compete for what varies. Scales that are not 1 and biases that are not zero, of weights
        that `load_state_dict` has set, are left alone.
        """
        if self.cfg.normalize_activations == "expected_average_only_in":
            parts = batch.split([self.cfg.d_in, self.d_out], dim=-1)
            for part, scale in zip(parts, (self.source_scale, self.target_scale), strict=True):
                if scale.item() == 1.0:
                    mean_norm = self._mean_over_rows(part.double().norm(dim=-1))
                    scale.copy_(part.shape[-1] ** 0.5 / mean_norm.clamp(min=1e-12))
        source, target = self.split_batch(batch)
        wide = torch.promote_types(self.dtype, torch.float32)
        if not bool(self.b_dec.any()):
            self.b_dec.copy_(self._mean_over_rows(target.to(wide)))
        if not bool(self.b_enc.any()):
            self.b_enc.copy_(-(self._mean_over_rows(source.to(wide)) @ self.W_enc.to(wide)))

    def _mean_over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of the rows of the whole batch, whoever holds them."""
        return self.group.sum(values.mean(dim=0), "rows") / self.group.row_blocks

    # ---- inference

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        source = self.hook_sae_input(sae_in.to(self.dtype))
        return source * self.source_scale.to(source.dtype)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Prediction of the target `[*batch, d_out]`, without the skip."""
        decoded = act_times_W_dec(feature_acts, self.W_dec, self.cfg.rescale_acts_by_decoder_norm)
        return self.hook_sae_recons(self.unscaled(decoded + self.b_dec))

    def unscaled(self, prediction: torch.Tensor) -> torch.Tensor:
        """A prediction `[*batch, d_out]` in the units of the target, from those of the training step."""
        return prediction / self.target_scale.to(prediction.dtype)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Prediction of the target `[*batch, d_out]` from the source `[*batch, d_in]`."""
        return self.decode(self.encode(x))

    # ---- saving

    @contextmanager
    def scaled_by(self, factor: float) -> Iterator[None]:
        """Within, what is saved has the trainer's factor folded into it, as at the end of training."""
        scales = (self.source_scale, self.target_scale)
        before = [scale.clone() for scale in scales]
        for scale in scales:
            scale.mul_(factor)
        try:
            yield
        finally:
            for scale, value in zip(scales, before, strict=True):
                scale.copy_(value)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold the trainer's factor and the two of our own, so that the weights read unscaled pairs."""
        self._leave_training_space()
        state = dict(self.named_parameters())
        source = scaling_factor * self.source_scale.item()
        target = scaling_factor * self.target_scale.item()
        for name, value in _fold_scales(state, source, target).items():
            state[name].copy_(value)
        if self.cfg.rescale_acts_by_decoder_norm:
            self.topk_threshold.div_(target)  # in units of pre-activation times decoder norm
        self.source_scale.fill_(1.0)
        self.target_scale.fill_(1.0)
        self.cfg.normalize_activations = "none"

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        source, target = (state_dict.pop(f"{part}_scale").item() for part in ("source", "target"))
        state_dict.update(_fold_scales(state_dict, source, target))
        if self.cfg.rescale_acts_by_decoder_norm:
            state_dict["topk_threshold"] = state_dict["topk_threshold"] / target
        if self.cfg.input_gain == "norm_weight":
            gain, offset = state_dict.pop("gain"), state_dict.pop("offset")
            if not bool(torch.isfinite(gain).all()):
                raise ValueError(
                    "input_gain='norm_weight', but this transcoder was never told the norm's weight, so "
                    "it cannot be folded away: call set_input_gain(weight, bias) before saving."
                )
            state_dict.update(fold_gain(state_dict, gain, offset))
        super().process_state_dict_for_saving_inference(state_dict)


class MatryoshkaTrainingSkipTranscoder(MatryoshkaTrainingTranscoder):
    """A Matryoshka transcoder with a linear skip `W_skip x`, the same in every level."""

    cfg: MatryoshkaTrainingSkipTranscoderConfig  # type: ignore[assignment]
    config_class = MatryoshkaTrainingSkipTranscoderConfig
    W_skip: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_skip = nn.Parameter(
            torch.zeros(self.d_out, self.cfg.d_in, dtype=self.dtype, device=self.device)
        )

    @override
    def weights(self) -> NestedWeights:
        return super().weights()._replace(W_skip=self.W_skip)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (self.source_scale / self.target_scale).to(self.dtype)
        skip = (x.to(self.dtype) * scale) @ self.W_skip.T
        return super().forward(x) + skip


def _fold_scales(
    tensors: Mapping[str, torch.Tensor], source: float, target: float
) -> dict[str, torch.Tensor]:
    """The weights that do for x and y what `tensors` do for source·x and target·y."""
    folded = {
        "W_enc": tensors["W_enc"] * source,
        "W_dec": tensors["W_dec"] / target,
        "b_dec": tensors["b_dec"] / target,
    }
    if "W_skip" in tensors:
        folded["W_skip"] = tensors["W_skip"] * (source / target)
    return folded


def fold_gain(
    tensors: Mapping[str, torch.Tensor], gain: torch.Tensor, offset: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weights that do for x what `tensors` do for gain·x + offset."""
    dtype = tensors["W_enc"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    gain, offset = gain.to(wide), offset.to(wide)
    W_enc = tensors["W_enc"].to(wide)
    folded = {
        "W_enc": gain[:, None] * W_enc,
        "b_enc": tensors["b_enc"].to(wide) + offset @ W_enc,
    }
    if "W_skip" in tensors:
        W_skip = tensors["W_skip"].to(wide)
        folded["W_skip"] = W_skip * gain
        folded["b_dec"] = tensors["b_dec"].to(wide) + W_skip @ offset
    return {name: value.to(dtype) for name, value in folded.items()}
