"""Sums over tokens that make the metrics of every prefix, in float64 and bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from sae_lens.evals import ExplainedVarianceCalculator

from saelens_matryoshka.ops import ALONE, Group
from saelens_matryoshka.ops.group import Over

# Edges of the density histogram, in log10 of the share of tokens a latent fires on.
DENSITY_EDGES = tuple(exponent / 2 for exponent in range(-14, 1))
# Cosine above which two decoder rows count as the same direction.
REDUNDANT_COSINE = 0.9
# Values computed at a time where a whole matrix would not fit.
_CHUNK_VALUES = 1 << 25

T = TypeVar("T")


def float64_device(device: torch.device) -> torch.device:
    """Where to keep float64 sums of what is on a device: there, but on the CPU for Apple's GPUs (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


class ReconstructionSums:
    """How near every prefix's prediction comes to the target.

    FVU = Σ‖y - ŷ‖² / Σ‖y - ȳ‖² with ȳ the per-dimension mean over the evaluated tokens: predicting the
    mean scores exactly 1. Explained variance is SAELens's own calculation of 1 - FVU.
    """

    def __init__(self, n_levels: int, d_out: int, device: torch.device) -> None:
        device = float64_device(device)
        self.n_tokens = 0
        self.squared_error = torch.zeros(n_levels, dtype=torch.float64, device=device)
        self.cosine = torch.zeros(n_levels, dtype=torch.float64, device=device)
        self.sum = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.sum_of_squares = torch.zeros((), dtype=torch.float64, device=device)
        self._explained = [ExplainedVarianceCalculator() for _ in range(n_levels)]

    def add(self, target: torch.Tensor, predictions: torch.Tensor) -> None:
        """Add targets `[n, d_out]` and the prefixes' predictions `[n_levels, n, d_out]`."""
        target, predictions = target.to(self.sum.device), predictions.to(self.sum.device)
        wide = target.double()
        self.n_tokens += len(wide)
        self.sum += wide.sum(dim=0)
        self.sum_of_squares += wide.pow(2).sum()
        for level, prediction in enumerate(predictions):
            predicted = prediction.double()
            self.squared_error[level] += (predicted - wide).pow(2).sum()
            self.cosine[level] += F.cosine_similarity(predicted, wide, dim=-1).sum()
            self._explained[level].add_batch(prediction, target)

    def mean(self, group: Group = ALONE) -> torch.Tensor:
        """Mean target `[d_out]`, over the tokens of all blocks of a group."""
        sums = group.sum(torch.cat([self.sum, self.sum.new_tensor([self.n_tokens])]), "all")
        return sums[:-1] / sums[-1]

    def fvu(self) -> torch.Tensor:
        """`[n_levels]`."""
        variance = self.sum_of_squares - self.sum.pow(2).sum() / self.n_tokens
        return self.squared_error / variance

    def mean_cosine(self) -> torch.Tensor:
        """Mean over tokens of the cosine between target and prediction, `[n_levels]`."""
        return self.cosine / self.n_tokens

    def explained_variance(self) -> list[float]:
        """SAELens's `ExplainedVarianceCalculator` of every prefix."""
        return [calculator.compute() for calculator in self._explained]


class FiringCounts:
    """How often each latent fires: L0, density and dead latents of every prefix."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n_tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)

    def add(self, feature_acts: torch.Tensor) -> None:
        """Add activations `[n, d_sae]`; negative ones, which some architectures have, are active too."""
        self.n_tokens += len(feature_acts)
        self.fired += (feature_acts != 0).sum(dim=0)

    def gathered(self, group: Group) -> FiringCounts:
        """Of the whole dictionary on all tokens, where the shards of a copy saw the same ones."""
        whole = summed(self, group, "rows")
        whole.fired = group.gather_latents(whole.fired)
        return whole

    def l0(self, width: int) -> float:
        """Mean number of active latents among the first `width`."""
        return self.fired[:width].sum().item() / self.n_tokens

    def n_dead(self, width: int) -> int:
        """Latents among the first `width` that never fired."""
        return int((self.fired[:width] == 0).sum())

    def density_histogram(self, width: int) -> list[int]:
        """How many of the first `width` latents fire on which share of the tokens.

        Returns:
            One count per interval between `DENSITY_EDGES` (log10 of the share). Dead latents are in none
            of them; a share below the lowest edge counts in the lowest interval.
        """
        fired = self.fired[:width][self.fired[:width] > 0].cpu()
        share = (fired.double() / self.n_tokens).log10().clamp(min=DENSITY_EDGES[0])
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        return torch.histogram(share, edges).hist.long().tolist()


class NextTokenSums:
    """Cross-entropy of next-token predictions, and their divergence from the clean model's."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.ce = 0.0
        self.kl = 0.0

    def add(self, logits: torch.Tensor, clean: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions at n positions.

        Args:
            logits: `[n, d_vocab]`, with the replacement.
            clean: `[n, d_vocab]`, without.
            labels: `[n]`, the tokens that came next.
        """
        self.n_tokens += len(labels)
        rows_at_a_time = max(1, _CHUNK_VALUES // logits.shape[-1])
        for rows, clean_rows, label in zip(
            logits.split(rows_at_a_time),
            clean.split(rows_at_a_time),
            labels.split(rows_at_a_time),
            strict=True,
        ):
            log_p, log_q = clean_rows.float().log_softmax(-1), rows.float().log_softmax(-1)
            self.ce += F.nll_loss(log_q, label.to(log_q.device), reduction="none").cpu().double().sum().item()
            per_row = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
            self.kl += per_row.cpu().double().sum().item()

    def mean_ce(self) -> float:
        """Nats per token."""
        return self.ce / self.n_tokens

    def mean_kl(self) -> float:
        """KL(clean ‖ with the replacement), nats per token."""
        return self.kl / self.n_tokens


@torch.no_grad()
def decoder_redundancy(W_dec: torch.Tensor, widths: Sequence[int]) -> list[float]:
    """Share of each prefix's latents whose nearest other decoder row in the prefix is nearly parallel.

    Args:
        W_dec: `[d_sae, d_out]`.
        widths: Cumulative widths of the prefixes.

    Returns:
        Per prefix, the share of latents with a cosine above `REDUNDANT_COSINE` to another.
    """
    rows = F.normalize(W_dec.to(torch.promote_types(W_dec.dtype, torch.float32)), dim=-1)
    d_sae = len(rows)
    found = torch.zeros(len(widths), dtype=torch.long, device=rows.device)
    chunk = max(1, _CHUNK_VALUES // d_sae)
    for start in range(0, d_sae, chunk):
        cosines = rows[start : start + chunk] @ rows.T
        n = len(cosines)
        cosines[torch.arange(n), torch.arange(start, start + n)] = -1.0
        for level, width in enumerate(widths):
            inside = min(max(width - start, 0), n)
            if inside:
                nearest = cosines[:inside, :width].amax(dim=-1)
                found[level] += (nearest > REDUNDANT_COSINE).sum()
    return [count / width for count, width in zip(found.tolist(), widths, strict=True)]


def summed(sums: T, group: Group, over: Over) -> T:
    """What sums would be, had one process added all that each block of a group has.

    Args:
        sums: As in `state_of`; left as they are. All blocks have added something, if only empty tensors.
        group: The blocks.
        over: Which of them.
    """
    whole = copy.deepcopy(sums)
    restore(whole, {name: group.sum(value, over) for name, value in state_of(whole).items()})
    return whole


def state_of(sums: Any) -> dict[str, torch.Tensor]:
    """All numbers that sums are made of, by name.

    Args:
        sums: One of the classes here, or a dict or list of them.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in _parts(sums):
        if isinstance(value, torch.Tensor):
            state[name] = value
        elif isinstance(value, int | float):
            state[name] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.long)
        elif value is not None:
            state |= {f"{name}.{inner}": tensor for inner, tensor in state_of(value).items()}
    return state


def restore(sums: Any, state: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Make sums, made with the same arguments, those that gave this state, to the last bit."""
    for name, value in _parts(sums):
        found = state.get(prefix + name)
        if found is None:
            restore(value, state, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            setattr(sums, name, found.item())
        else:  # of None, what SAELens makes of it, which is on the CPU
            device = value.device if isinstance(value, torch.Tensor) else found.device
            setattr(sums, name, found.to(device, copy=True))


def _parts(sums: Any) -> list[tuple[str, Any]]:
    if isinstance(sums, list):
        return [(str(index), part) for index, part in enumerate(sums)]
    return [] if sums is None else list((sums if isinstance(sums, dict) else vars(sums)).items())
