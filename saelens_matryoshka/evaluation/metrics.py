"""Sums over tokens that make the metrics of every prefix, in float64 and bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class ReconstructionSums:
    """Fraction of variance unexplained of every prefix.

    FVU = Σ‖y - ŷ‖² / Σ‖y - ȳ‖² with ȳ the per-dimension mean over the evaluated tokens: predicting the
    mean scores exactly 1.
    """

    def __init__(self, n_levels: int, d_out: int, device: torch.device) -> None:
        self.n_tokens = 0
        self.squared_error = torch.zeros(n_levels, dtype=torch.float64, device=device)
        self.sum = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.sum_of_squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, target: torch.Tensor, predictions: torch.Tensor) -> None:
        """Add targets `[n, d_out]` and the prefixes' predictions `[n_levels, n, d_out]`."""
        wide = target.double()
        self.n_tokens += len(wide)
        self.sum += wide.sum(dim=0)
        self.sum_of_squares += wide.pow(2).sum()
        for level, prediction in enumerate(predictions):
            self.squared_error[level] += (prediction.double() - wide).pow(2).sum()

    def mean(self) -> torch.Tensor:
        """Mean target `[d_out]`."""
        return self.sum / self.n_tokens

    def fvu(self) -> torch.Tensor:
        """`[n_levels]`."""
        variance = self.sum_of_squares - self.sum.pow(2).sum() / self.n_tokens
        return self.squared_error / variance


class FiringCounts:
    """How often each latent fires: L0, density and dead latents of every prefix."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n_tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)

    def add(self, feature_acts: torch.Tensor) -> None:
        """Add activations `[n, d_sae]`."""
        self.n_tokens += len(feature_acts)
        self.fired += (feature_acts > 0).sum(dim=0)

    def l0(self, width: int) -> float:
        """Mean number of active latents among the first `width`."""
        return self.fired[:width].sum().item() / self.n_tokens

    def n_dead(self, width: int) -> int:
        """Latents among the first `width` that never fired."""
        return int((self.fired[:width] == 0).sum())


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
        for rows, clean_rows, label in zip(
            logits.split(512), clean.split(512), labels.split(512), strict=True
        ):
            log_p, log_q = clean_rows.float().log_softmax(-1), rows.float().log_softmax(-1)
            self.ce += F.nll_loss(log_q, label, reduction="sum").item()
            self.kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()

    def mean_ce(self) -> float:
        """Nats per token."""
        return self.ce / self.n_tokens

    def mean_kl(self) -> float:
        """KL(clean ‖ with the replacement), nats per token."""
        return self.kl / self.n_tokens
