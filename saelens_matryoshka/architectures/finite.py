"""Keeping NaN and Inf out of the weights.

Activations and loss are looked at before the gradient is taken, the gradient before the optimizer moves the
weights. A bad batch stops the training, or is left out if so many may be (`FiniteGuard.may_skip`). Either way
the weights are those of before it.

On a GPU nothing waits for the look at the gradient: Adam's fused kernel is told on the device to do nothing,
and the host learns of it with the next step's loss.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from saelens_matryoshka.ops import ALONE, Group


class NonFiniteActivationsError(RuntimeError):
    """NaN or Inf in a training step. The weights have not been touched by it."""


class FiniteGuard:
    """Counts the bad batches of a run, and stops it when there are too many."""

    may_skip: int = 0
    """bad batches that are left out before the training stops"""
    n_skipped: int = 0
    """bad batches left out so far"""

    def __init__(self) -> None:
        self._bad_gradient: torch.Tensor | None = None
        self._no_loss: torch.Tensor | bool = False
        self._step = 0

    def is_finite(self, loss: torch.Tensor, source: torch.Tensor, n_steps: int, group: Group = ALONE) -> bool:
        """Whether a step's loss and source are finite, in all processes; waits for the device, once.

        Raises:
            NonFiniteActivationsError: the gradient of the step before was not, and no more may be skipped.
        """
        # A source row of NaN selects nothing, so it would not show in the loss.
        self._no_loss = loss.detach() == 0
        finite = torch.isfinite(loss.detach()) & torch.isfinite(source.sum(dtype=torch.float32))
        finite = group.min(finite.float(), "all").bool()
        pending = self._bad_gradient
        if bool(finite if pending is None else finite & ~pending.to(finite.device)):
            self._bad_gradient, self._step = None, n_steps
            return True
        self.settle()
        self._step = n_steps
        return bool(finite)

    def settle(self) -> None:
        """Learn whether the last step's gradient was finite; waits for the device.

        Raises:
            NonFiniteActivationsError: it was not, and no more may be skipped.
        """
        pending, self._bad_gradient = self._bad_gradient, None
        if pending is not None and bool(pending):
            self.skip_or_raise(
                f"Step {self._step}: the gradient holds NaN or Inf, or its norm overflows its dtype, "
                "although loss and activations are finite. The weights have not been touched by this step. "
                "Lower the lr."
            )

    def skip_or_raise(self, message: str) -> None:
        """Count a bad batch.

        Raises:
            NonFiniteActivationsError: with the message, if no more may be skipped.
        """
        if self.n_skipped >= self.may_skip:
            raise NonFiniteActivationsError(
                message + (f" {self.n_skipped} batches had been skipped before." if self.n_skipped else "")
            )
        self.n_skipped += 1
        warnings.warn(f"{message} Skipped, {self.n_skipped} of at most {self.may_skip}.", stacklevel=2)

    def watch(self, optimizer: torch.optim.Optimizer, probes: list[torch.Tensor]) -> None:
        """Look at the gradient before every update, and leave the update out if it is not finite.

        Args:
            optimizer: Its gradients have been clipped by their global norm, which puts a NaN anywhere into
                all of them, and turns all of them to 0 where the norm is infinite. (Where the loss is 0, a
                gradient of 0 is what it should be.)
            probes: Small parameters whose gradients are therefore enough to look at.
        """

        def before_update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            gradients = [p.grad.float().abs().sum() for p in probes if p.grad is not None]
            if not gradients:  # a batch that was left out
                return
            total = torch.stack(gradients).sum()
            bad = ~(torch.isfinite(total) & ((total > 0) | self._no_loss))
            if total.is_cuda and optimizer.param_groups[0].get("fused"):
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            elif bool(bad):
                _drop_gradients(optimizer)
            self._bad_gradient = bad

        optimizer.register_step_pre_hook(before_update)


def _drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def describe_rows(values: torch.Tensor, group: Group = ALONE) -> str:
    """How many rows of `[B, d]`, of all processes' together, are bad; empty if none is."""
    bad = group.count(int((~torch.isfinite(values)).any(dim=-1).sum()), "rows")
    return f"contain NaN or Inf in {bad} of {group.count(len(values), 'rows')} rows" if bad else ""
