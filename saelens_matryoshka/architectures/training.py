"""What the Matryoshka architectures share: the training step, its metrics, the threshold, the folding.

A subclass says how a batch becomes source and target (`split_batch`) and how the skip enters; the
mathematics of the step is in `saelens_matryoshka.ops`.

The trained model selects with TopK. What is *used* is a JumpReLU model: `encode` (inference, of the
training object and of the saved stock model alike) keeps the activations above one learned threshold.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from safetensors import safe_open
from safetensors.torch import save_file
from typing_extensions import override

from saelens_matryoshka.architectures.calibration import RecentRows, threshold_for_l0
from saelens_matryoshka.architectures.config import MatryoshkaTrainingConfig
from saelens_matryoshka.architectures.finite import FiniteGuard, describe_rows
from saelens_matryoshka.architectures.sparse_acts import SparseActs
from saelens_matryoshka.ops import ALONE, Group, NestedStep, NestedStepFn, NestedWeights, SparseStep

TRAINING_STATE_FILENAME = "training_state.safetensors"
_BYTES = ".bytes"

P = ParamSpec("P")
R = TypeVar("R")


class MatryoshkaTraining(BatchTopKTrainingSAE):
    """Base of the Matryoshka training classes."""

    cfg: MatryoshkaTrainingConfig  # type: ignore[assignment]

    config_class: type[MatryoshkaTrainingConfig]
    """What a subclass is made from"""
    step_fn: NestedStepFn
    """The implementation of the training step: `ops.SparseStep`, or `ops.reference_step`"""
    group: Group = ALONE
    """The processes that train this dictionary together"""
    finite: FiniteGuard
    """What happens to a batch of NaN or Inf"""

    def __init__(self, cfg: MatryoshkaTrainingConfig, use_error_term: bool = False) -> None:
        if not (
            isinstance(cfg, self.config_class) and cfg.architecture() == self.config_class.architecture()
        ):
            raise ValueError(
                f"cfg is a {type(cfg).__name__}, and a {type(self).__name__} is made from a "
                f"{self.config_class.__name__}."
            )
        cfg.__post_init__()  # its fields may have been changed since it was made
        super().__init__(cfg, use_error_term)
        self.step_fn = SparseStep()
        self.finite = FiniteGuard()
        self.recent = RecentRows()
        self._threshold_is_stale = False

    # ---- what a subclass defines

    @abstractmethod
    def split_batch(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Source `[B, d_in]` and target `[B, d_out]` of a batch as the data provider gives it."""

    def weights(self) -> NestedWeights:
        """The parameters, as the step takes them."""
        return NestedWeights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    def prepare_for_training(self, batch: torch.Tensor) -> None:
        """Called once, with the first batch that weights not loaded from a file are trained on."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = _by_latent(self.W_enc.data)

    # ---- training

    _prepared = False

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _by_latent(state_dict["W_enc"])
        for name, buffer in self.named_buffers():
            if (saved := state_dict.pop(f"{name}{_BYTES}", None)) is not None:
                exact = saved.to(torch.uint8, copy=True).view(buffer.dtype)
                state_dict[name] = exact.reshape(buffer.shape)
            elif name in state_dict:  # saved as the state dict alone
                state_dict[name] = state_dict[name].to(buffer.dtype)
        self._prepared = True

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Add the bytes of threshold, scales and gain, which loading takes.

        SAELens's loader casts all it reads to the weights' dtype, and every dtype has the whole numbers up
        to 255.
        """
        super().process_state_dict_for_saving(state_dict)
        for name, _ in self.named_buffers():
            state_dict[f"{name}{_BYTES}"] = state_dict[name].reshape(-1).view(torch.uint8).clone()

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's loss and metrics.

        Args:
            step_input: `sae_in` is the batch, `[B, d_in]`, of a transcoder `[B, d_in + d_out]`, and
                `dead_neuron_mask` `[d_sae]` or None.

        Raises:
            ValueError: the batch is no tensor, or it or the mask is of another shape.
            NonFiniteActivationsError: the batch or the loss holds NaN or Inf, and no more may be skipped.
        """
        # torch.compile is to trace none of it: the step's sizes depend on the data, and it brings its own
        # gradient; what is kept from batch to batch would have it trace anew at every step, and would be
        # memory that CUDA graphs write over.
        return _untraced(self._train_on)(step_input)

    def _train_on(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._require_shapes(step_input.sae_in, step_input.dead_neuron_mask)
        source, target = self.split_batch(step_input.sae_in)
        n_steps = step_input.n_training_steps
        if not self._prepared:
            if not self.is_usable(step_input.sae_in, n_steps):  # the weights would start from it
                return self._left_out(source, target)
            self.prepare_for_training(step_input.sae_in)
            self._prepared = True
            source, target = self.split_batch(step_input.sae_in)
        step = self.step_fn(
            self.weights(),
            source,
            target,
            self.cfg.objective(subtract_b_dec=self.cfg.apply_b_dec_to_input),
            dead=step_input.dead_neuron_mask,
        )
        if not self.finite.is_finite(step.loss, source, n_steps, self.group):
            self.finite.skip_or_raise(self._what_is_not_finite(source, target, n_steps))
            return self._left_out(source, target)
        self._update_threshold(step, source)
        acts = step.feature_acts
        return TrainStepOutput(
            sae_in=target,
            sae_out=step.prediction,
            feature_acts=SparseActs(acts) if acts.is_sparse else acts,
            hidden_pre=step.hidden_pre,
            loss=step.loss,
            losses=self._losses(step),
            metrics=self._metrics(step, target, step_input.dead_neuron_mask),
        )

    def _require_shapes(self, batch: torch.Tensor, dead: torch.Tensor | None) -> None:
        if not isinstance(batch, torch.Tensor):
            raise ValueError(f"sae_in is a {type(batch).__name__}, and must be a tensor.")
        if batch.dim() != 2 or len(batch) == 0:
            raise ValueError(
                f"sae_in has shape {list(batch.shape)}, and must be a batch of rows, one per token: flatten "
                "prompts and positions into one dimension."
            )
        if dead is not None and dead.shape != (self.cfg.d_sae,):
            raise ValueError(
                f"dead_neuron_mask has shape {list(dead.shape)}, and must have one entry for each of the "
                f"{self.cfg.d_sae} latents."
            )

    def is_usable(self, batch: torch.Tensor, n_steps: int = 0) -> bool:
        """Whether a batch of activations is finite, in all processes; if not, it counts as skipped.

        Raises:
            NonFiniteActivationsError: it is not, and no more may be skipped.
        """
        finite = bool(self.group.min(torch.isfinite(batch).all().float(), "all"))
        if not finite:
            self.finite.skip_or_raise(self._what_is_not_finite(*self.split_batch(batch), n_steps))
        return finite

    def _losses(self, step: NestedStep) -> dict[str, torch.Tensor]:
        """Under SAELens's names: mse_loss is the whole dictionary's, inner_mse_loss_* the prefixes'."""
        *inner, full = step.level_losses
        losses = {"mse_loss": full, "auxiliary_reconstruction_loss": step.aux_loss}
        for width, loss in zip(self.cfg.matryoshka_widths, inner, strict=False):
            losses[f"inner_mse_loss_{width}"] = loss
        if self.cfg.l1_coefficient > 0:
            losses["l1_loss"] = step.l1_loss
        return losses

    def _metrics(self, step: NestedStep, target: torch.Tensor, dead: torch.Tensor | None) -> dict[str, Any]:
        """Of this batch. The variance is only computed when something is logged, so each is lazy."""
        levels = step.level_losses
        variance = _variance(target, self.group)

        metrics: dict[str, Any] = {
            "fvu": lambda: levels[-1] / variance(),
            "prefix_l2_min": lambda: levels.min(),
            "prefix_l2_max": lambda: levels.max(),
            "topk_threshold": self.topk_threshold,
        }
        for level, width in enumerate(self.cfg.matryoshka_widths):
            metrics[f"fvu_w{width}"] = lambda level=level: levels[level] / variance()
        if dead is not None:
            metrics["dead_fraction"] = lambda: dead.float().mean()
        return metrics

    def _what_is_not_finite(self, source: torch.Tensor, target: torch.Tensor, n_steps: int) -> str:
        metadata = self.cfg.metadata
        hooks = {"source": (source, metadata.hook_name), "target": (target, metadata.hook_name_out)}
        for role, (values, hook) in hooks.items():
            if bad_rows := describe_rows(values, self.group):
                return (
                    f"Step {n_steps}: the {role} activations of hook {hook or metadata.hook_name!r} "
                    f"{bad_rows}. The weights have not been "
                    "touched by this step and saved checkpoints are intact. A model in float16, or "
                    "autocast_lm, may overflow: run it in bfloat16 or float32."
                )
        return (
            f"Step {n_steps}: the loss is not finite although the activations of hook "
            f"{metadata.hook_name!r} are. The weights have not been touched by this step and "
            "saved checkpoints are intact. Try a lower lr, or normalize_activations="
            "'expected_average_only_in'."
        )

    def _left_out(self, source: torch.Tensor, target: torch.Tensor) -> TrainStepOutput:
        """What a step gives whose batch was skipped: nothing fires, and no parameter has a gradient."""
        index = torch.zeros((2, 0), dtype=torch.long, device=source.device)
        nothing = torch.sparse_coo_tensor(
            index, source.new_zeros(0), (len(source), self.cfg.d_sae), check_invariants=False
        ).coalesce()
        unknown = torch.full((), torch.nan, device=source.device)
        losses = {"mse_loss": unknown, "auxiliary_reconstruction_loss": unknown}
        names = ["fvu", *(f"fvu_w{width}" for width in self.cfg.matryoshka_widths)]
        # l0: in place of the 0 that the activations would give
        metrics: dict[str, Any] = {"topk_threshold": self.topk_threshold, "l0": unknown}
        metrics |= dict.fromkeys(names, lambda: unknown)
        return TrainStepOutput(
            sae_in=target,
            sae_out=torch.full_like(target, torch.nan),
            feature_acts=SparseActs(nothing),
            hidden_pre=nothing,
            loss=unknown.clone().requires_grad_(),
            losses=losses,
            metrics=metrics,
        )

    # ---- threshold

    @torch.no_grad()
    def _update_threshold(self, step: NestedStep, source: torch.Tensor) -> None:
        old, batch_threshold = self.topk_threshold, step.batch_threshold.to(torch.double)
        if self.cfg.threshold_calibration == "ema":
            rate = self.cfg.topk_threshold_lr
            moved = (1 - rate) * old + rate * batch_threshold
            old.copy_(torch.where(batch_threshold > 0, moved, old))
        else:
            old.copy_(batch_threshold)
            self.recent.add(source, self.group.row_blocks)
            self._threshold_is_stale = True

    @torch.no_grad()
    def calibrate_threshold(self) -> None:
        """With "l0" calibration, set the threshold so that k latents per recent row are above it.

        Done by itself before inference, folding and saving. Without recent rows, as after loading, the
        threshold stays as it is. Called by all processes that train together.
        """
        if not self._threshold_is_stale:
            return
        rows = self.recent.rows()
        threshold = threshold_for_l0(
            rows - self.b_dec if self.cfg.apply_b_dec_to_input else rows,
            self.W_enc,
            self.b_enc,
            self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None,
            self.cfg.k,
            guess=self.topk_threshold.item(),
            group=self.group,
        )
        self.topk_threshold.fill_(threshold)
        self._threshold_is_stale = False

    @contextmanager
    def keeping_threshold(self) -> Iterator[None]:
        """Within, the threshold may be calibrated for inference; afterwards it is what it was in training."""
        threshold, stale = self.topk_threshold.clone(), self._threshold_is_stale
        try:
            yield
        finally:
            self.topk_threshold.copy_(threshold)
            self._threshold_is_stale = stale

    def _leave_training_space(self) -> None:
        """Before the weights are folded: the recent rows would not fit them any more."""
        self.calibrate_threshold()
        self.recent.clear()

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module.to(dtype) would cast the buffers too, and in bfloat16 a moving average sticks.
        before = dict(self._buffers)
        out = super()._apply(*args, **kwargs)
        for name, buffer in before.items():
            cast = self._buffers[name]
            if buffer is not None and cast is not None and cast.dtype != buffer.dtype:
                source = cast if buffer.is_meta else buffer.to(cast.device)
                self._buffers[name] = source.to(buffer.dtype)
        self.recent.to(self.W_enc.device)
        return out

    # ---- inference

    @override
    def get_activation_fn(self) -> Any:
        if self.cfg.selection == "token":
            return TopK(int(self.cfg.k))
        return super().get_activation_fn()

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations `[*batch, d_sae]` of the inference model: JumpReLU at the threshold so far."""
        self.calibrate_threshold()
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        kept = hidden_pre > self.topk_threshold.clamp(min=0)
        return self.hook_sae_acts_post(hidden_pre * kept)

    # ---- saving

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save weights and config, and beside them what training needs to go on from here.

        The saved threshold is calibrated; training goes on with the one it has.
        """
        self.finite.settle()
        recent = self.recent.batches()
        tensors = {"topk_threshold": self.topk_threshold.clone()}
        if recent:
            tensors["recent_rows"] = torch.cat(recent)
        state = {
            "recent_lengths": [len(batch) for batch in recent],
            "threshold_is_stale": self._threshold_is_stale,
            "n_skipped": self.finite.n_skipped,
        }
        with self.keeping_threshold():
            paths = super().save_model(path)
        save_file(tensors, Path(path) / TRAINING_STATE_FILENAME, metadata={"state": json.dumps(state)})
        return paths

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load the weights that `save_model` saved, and what training needs to go on from there."""
        super().load_weights_from_checkpoint(checkpoint_path)
        self.load_training_state(checkpoint_path)

    def load_training_state(self, checkpoint_path: Path | str) -> None:
        """Load what `save_model` saved beside the weights."""
        path = Path(checkpoint_path) / TRAINING_STATE_FILENAME
        if not path.exists():  # a checkpoint of SAELens's own class
            return
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            state = json.loads(file.metadata()["state"])
            self.topk_threshold.copy_(file.get_tensor("topk_threshold"))
            self.recent.clear()
            if lengths := state["recent_lengths"]:
                for batch in file.get_tensor("recent_rows").split(lengths):
                    self.recent.add(batch)
        self._threshold_is_stale = state["threshold_is_stale"]
        self.finite.n_skipped = state["n_skipped"]

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors by name, as safetensors takes them, with the threshold calibrated.

        W_enc is a copy in row-major layout, unlike the parameter; with `keep_vars=True` it is the parameter.
        To change the weights, use the parameters or `load_state_dict`.
        """
        self.calibrate_threshold()
        return super().state_dict(*args, **kwargs)

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}W_enc"] = destination[f"{prefix}W_enc"].contiguous()

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self._leave_training_space()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: torch.Tensor,
        whitening_matrix: torch.Tensor,
        unwhitening_matrix: torch.Tensor,
    ) -> None:
        self._leave_training_space()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Turn a training state dict into that of the stock JumpReLU model, everything folded.

        Decoder rows get norm 1 and the threshold one entry per latent, whatever the selection was by.
        """
        dtype = state_dict["b_enc"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        norms = state_dict["W_dec"].to(wide).norm(dim=-1).clamp(min=1e-8)
        threshold = state_dict.pop("topk_threshold").to(wide).clamp(min=0)
        if not self.cfg.rescale_acts_by_decoder_norm:
            threshold = threshold * norms
        state_dict["W_enc"] = (state_dict["W_enc"].to(wide) * norms).to(dtype).contiguous()
        state_dict["b_enc"] = (state_dict["b_enc"].to(wide) * norms).to(dtype)
        state_dict["W_dec"] = (state_dict["W_dec"].to(wide) / norms[:, None]).to(dtype).contiguous()
        state_dict["threshold"] = threshold.expand(len(norms)).to(dtype).contiguous()


def _variance(target: torch.Tensor, group: Group) -> Callable[[], torch.Tensor]:
    """Of the whole batch, summed over dimensions. Put off until it is asked for by a process alone."""
    wide = target.detach().to(torch.promote_types(target.dtype, torch.float32))
    if group.row_blocks == 1:
        return lambda: (wide - wide.mean(dim=0)).pow(2).sum(dim=-1).mean()
    # now, because all processes have to take part, and not all of them log
    sums = torch.cat([wide.sum(dim=0, dtype=torch.double), wide.double().pow(2).sum()[None]])
    means = group.sum(sums, "rows") / (len(target) * group.row_blocks)
    variance = (means[-1] - means[:-1].pow(2).sum()).to(wide.dtype)
    return lambda: variance


def _untraced(function: Callable[P, R]) -> Callable[P, R]:
    # Only where something is being compiled: the compiler takes seconds to import.
    if not torch.compiler.is_compiling():
        return function
    return torch.compiler.disable(function)  # type: ignore[return-value]


def _by_latent(W_enc: torch.Tensor) -> torch.Tensor:
    """The same `[d_in, d_sae]` matrix, a latent's entries next to each other in memory.

    That is the layout in which the encoder's gradient is made; in any other it would be transposed at
    every step.
    """
    return W_enc.T.contiguous().T
