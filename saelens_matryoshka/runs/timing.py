"""How long a run takes, from a short calibration on this machine.

A few real training steps of SAELens's trainer on random activations, and a few real passes of the language
model with random weights. What would take too long or too much memory is measured smaller and extrapolated:
the time of a step is a·B·S + b·B + c·S for B rows and S latents (the encoder's product, what follows the
batch, what follows the weights), and that of the language model grows with its layers and prompts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, SAETrainer, TrainingSAE
from sae_lens.util import extract_layer_from_tlens_hook_name

from saelens_matryoshka.architectures import MatryoshkaTrainingTranscoderConfig
from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.runner import prepare_trainer
from saelens_matryoshka.runs.buffer import BufferRows
from saelens_matryoshka.runs.language_models import ModelShape
from saelens_matryoshka.runs.memory import Configs, llm_batch_rows, widths_of
from saelens_matryoshka.store.reading import hooks_of

# The largest products and prompts that are measured as they are: some tenths of a second on a slow processor.
_CPU_STEP_VALUES, _GPU_STEP_VALUES = 4e9, 1e13
_CPU_TOKENS, _GPU_TOKENS = 512, 16_384
_CPU_TOKEN_VALUES = 1.2e9  # tokens times the square of their width: more tokens of a small model
_REPEATS = 3
_MOVED_VALUES = 1 << 24  # more than a processor's cache holds


@dataclass(frozen=True)
class Time:
    """Seconds of a run, without downloads, loading and tokenising."""

    step: float
    """one training step, of all dictionaries"""
    first_step: float
    """the first one, which allocates"""
    language_model: float
    """one of its batches"""
    moving: float
    """moving one row of activations"""
    rows: BufferRows
    """what is read and moved in all, by the steps"""
    scaling_rows: int
    """what is read before them, to estimate the scale of the activations"""
    llm_batch_rows: int
    """rows of one batch of the language model"""
    n_steps: int
    tokens_per_step: int
    overlapping: bool
    """the language model computes while the steps go on"""
    scaled: bool
    """measured smaller than it will be, and extrapolated"""

    @property
    def filling(self) -> float:
        """Seconds before the first step: the scale is estimated, and the buffer filled for the first time."""
        moved = self.rows.first_moved + self.scaling_rows * self.rows.moved / self.rows.read
        return self._reading(self.rows.first_read + self.scaling_rows) + moved * self.moving

    @property
    def language_model_per_step(self) -> float:
        """Seconds of the language model per step, once the buffer is full."""
        return self._reading(self.rows.read - self.rows.first_read) / self.n_steps

    @property
    def moving_per_step(self) -> float:
        """Seconds of moving activations per step, once the buffer is full."""
        return (self.rows.moved - self.rows.first_moved) * self.moving / self.n_steps

    @property
    def per_step(self) -> float:
        """Seconds of a step with the activations for it."""
        reading = self.language_model_per_step + self.moving_per_step
        return max(self.step, reading) if self.overlapping else self.step + reading

    @property
    def total(self) -> float:
        """Seconds of the training loop."""
        return self.filling + self.per_step * self.n_steps + self.first_step - self.step

    @property
    def tokens_per_second(self) -> float:
        """Of the training loop."""
        return self.tokens_per_step * self.n_steps / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: seconds."""
        return {
            "seconds": self.total,
            "tokens_per_second": self.tokens_per_second,
            "n_steps": self.n_steps,
            "seconds_per_step": self.step,
            "first_step_seconds": self.first_step,
            "seconds_per_llm_batch": self.language_model,
            "filling_seconds": self.filling,
            "llm_seconds_per_step": self.language_model_per_step,
            "buffer_seconds_per_step": self.moving_per_step,
            "extrapolated": self.scaled,
        }

    def _reading(self, n_rows: int) -> float:
        return self.language_model * n_rows / self.llm_batch_rows


def measure_time(cfgs: Configs, shape: ModelShape, rows: BufferRows, *, budget: int) -> Time:
    """Calibrate on this machine's devices, the config's own.

    Args:
        cfgs: Of the run, or of several in lockstep.
        shape: Its language model.
        rows: What its buffer reads and moves.
        budget: Bytes the calibration may take on any device.
    """
    cfg = cfgs[0]
    first_step, step, step_scaled = _steps_seconds(cfgs, budget)
    forward, forward_scaled = _forward_seconds(cfgs, shape)
    return Time(
        step=step,
        first_step=first_step,
        language_model=forward,
        moving=_seconds_per_row_moved(cfgs, rows),
        rows=rows,
        scaling_rows=max(map(_scaling_rows, cfgs)),
        llm_batch_rows=llm_batch_rows(cfg),
        n_steps=-(-cfg.training_tokens // cfg.train_batch_size_tokens),
        tokens_per_step=cfg.train_batch_size_tokens,
        overlapping=bool(cfg.prefetch_llm_batches),
        scaled=step_scaled or forward_scaled,
    )


def _scaling_rows(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    if cfg.sae.normalize_activations not in ("expected_average_only_in", "covariance_whitening"):
        return 0
    return cfg.n_batches_for_norm_estimate * cfg.train_batch_size_tokens


def _on_cpu(device: Any) -> bool:
    return torch.device(device).type == "cpu"


# ---- the step


def _steps_seconds(cfgs: Configs, budget: int) -> tuple[float, float, bool]:
    """The first and a later step of every dictionary; those of the same settings are measured once."""
    measured: dict[str, tuple[float, float, bool]] = {}
    found = []
    for cfg in cfgs:
        settings = str({**cfg.sae.to_dict(), "hook_name_out": None, "metadata": None})
        if settings not in measured:
            measured[settings] = _step_seconds(cfg, budget)
        found.append(measured[settings])
    first, later, scaled = zip(*found, strict=True)
    return sum(first), sum(later), any(scaled)


def _step_seconds(cfg: LanguageModelSAERunnerConfig[Any], budget: int) -> tuple[float, float, bool]:
    batch, d_sae, k = cfg.train_batch_size_tokens, cfg.sae.d_sae, cfg.sae.k
    width = cfg.sae.d_in + (getattr(cfg.sae, "d_out", None) or cfg.sae.d_in)
    most = _CPU_STEP_VALUES if _on_cpu(cfg.device) else _GPU_STEP_VALUES

    def too_much(rows: int, latents: int) -> bool:
        size = 4 * (4 * latents * width + rows * (latents + width * (len(cfg.sae.matryoshka_widths) + 2)))
        return rows * latents * cfg.sae.d_in > most or size > budget

    rows, latents = batch, d_sae
    while too_much(rows, latents) and rows > 256:
        rows //= 2
    while too_much(rows, latents) and latents > 4 * max(k, 256):
        latents //= 2
    if (rows, latents) == (batch, d_sae):
        return *_time_step(cfg, batch, d_sae), False
    sizes = ((rows, latents), (rows // 2, latents), (rows, latents // 2))
    full, half_rows, half_latents = (_time_step(cfg, *size) for size in sizes)
    first, later = (
        _extrapolate(full[i], half_rows[i], half_latents[i], batch / rows, d_sae / latents) for i in (0, 1)
    )
    return max(first, later), later, True


def _extrapolate(
    full: float, half_rows: float, half_latents: float, row_ratio: float, latent_ratio: float
) -> float:
    """a·B·S + b·B + c·S through three points."""
    b_part = max(0.0, 2 * half_latents - full)
    c_part = max(0.0, 2 * half_rows - full)
    product = max(0.0, full - b_part - c_part)
    return product * row_ratio * latent_ratio + b_part * row_ratio + c_part * latent_ratio


def _time_step(cfg: LanguageModelSAERunnerConfig[Any], rows: int, latents: int) -> tuple[float, float]:
    """Seconds of the first of some real steps of SAELens's trainer, and the median of the others."""
    cfg = copy.deepcopy(cfg)
    share = latents / cfg.sae.d_sae
    widths = sorted({max(1, int(width * share)) for width in cfg.sae.matryoshka_widths} | {latents})
    if cfg.sae.level_weights is not None:
        cfg.sae.level_weights = [1.0] * len(widths)
    cfg.sae.d_sae, cfg.sae.matryoshka_widths, cfg.train_batch_size_tokens = latents, widths, rows
    cfg.sae.device = cfg.device
    sae = TrainingSAE.from_dict(cfg.sae.to_dict()).to(cfg.device)
    if hasattr(sae, "gain"):
        sae.set_input_gain(torch.ones(cfg.sae.d_in, device=cfg.device))  # type: ignore[operator]
    width = cfg.sae.d_in + (cfg.sae.d_out if isinstance(cfg.sae, MatryoshkaTrainingTranscoderConfig) else 0)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(rows, width, generator=generator)
    batch = batch.to(cfg.act_store_device or cfg.device, getattr(torch, cfg.dtype.removeprefix("torch.")))
    trainer = SAETrainer(cfg.to_sae_trainer_config(), sae, iter([batch]))
    prepare_trainer(trainer)
    trainer.n_forward_passes_since_fired.fill_(0)

    def step() -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    return _seconds(step, cfg.device), _median_seconds(step, cfg.device)


def _median_seconds(function: Callable[[], Any], device: Any) -> float:
    function()
    return statistics.median(_seconds(function, device) for _ in range(_REPEATS))


def _seconds(function: Callable[[], Any], device: Any) -> float:
    start = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# ---- the language model


@torch.no_grad()
def _forward_seconds(cfgs: Configs, shape: ModelShape) -> tuple[float, bool]:
    """One batch of the language model up to the last hook, from slices of one and two layers."""
    cfg = cfgs[0]
    device = cfg.llm_device or cfg.device
    hooks = hooks_of(cfgs)
    last = _last_layer(hooks)
    depth = shape.n_layers if last is None else last + 1
    prompts = max(1, min(cfg.store_batch_size_prompts, _most_tokens(cfg, device) // cfg.context_size))
    tokens = torch.randint(0, 100, (prompts, cfg.context_size), device=device)
    times = []
    for n_layers in (1, min(2, depth)):
        model = shape.build(device, n_layers=n_layers, d_vocab=1000)
        names = [_in_layer(hook, n_layers - 1) for hook in hooks]

        def forward(model: Any = model, names: list[str] = names) -> None:
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=cfg.autocast_lm):
                hook_activations(model, tokens, list(dict.fromkeys(names)))

        times.append(_median_seconds(forward, device))
    one, two = times
    seconds = one + max(0.0, two - one) * (depth - 1)
    return (
        seconds * cfg.store_batch_size_prompts / prompts,
        depth > 2 or prompts < cfg.store_batch_size_prompts,
    )


def _most_tokens(cfg: LanguageModelSAERunnerConfig[Any], device: Any) -> int:
    if not _on_cpu(device):
        return _GPU_TOKENS
    return max(_CPU_TOKENS, int(_CPU_TOKEN_VALUES / cfg.sae.d_in**2))


def _last_layer(hooks: list[str]) -> int | None:
    layers = [extract_layer_from_tlens_hook_name(hook) for hook in hooks]
    known = [layer for layer in layers if layer is not None]
    return max(known) if len(known) == len(layers) else None


def _in_layer(hook: str, layer: int) -> str:
    """The same hook in another layer."""
    parts = hook.split(".")
    return ".".join(str(layer) if part.isdigit() else part for part in parts)


# ---- the buffer


@torch.no_grad()
def _seconds_per_row_moved(cfgs: Configs, rows: BufferRows) -> float:
    """To its shuffled place in a new tensor, as `saelens_matryoshka.store.mixing` does."""
    device = cfgs[0].act_store_device or cfgs[0].device
    width = sum(widths_of(cfgs).values())
    n = max(1, min(rows.serving, _MOVED_VALUES // width))
    part, order = torch.zeros(n, width, device=device), torch.randperm(n, device=device)
    return _median_seconds(lambda: part.index_select(0, order), device) / n
