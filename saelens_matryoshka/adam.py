"""Adam in one pass: the optimizer SAELens's trainer has made, switched to torch's fused kernel.

The update is the same. Unfused, Adam goes over weights, gradients and moments once per arithmetic
operation; fused, once. And the memory of the gradients may be kept from step to step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def fuse_adam(optimizer: torch.optim.Optimizer) -> None:
    """Make an Adam optimizer use its fused kernel, whether or not it has stepped already.

    Nothing is changed where torch has no such kernel for the parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, torch.optim.Adam) or not all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters
    ):
        return
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    for parameter, state in optimizer.state.items():
        # an optimizer that was resumed counted its steps on the CPU
        state["step"] = state["step"].to(parameter.device, torch.float32)
        # The kernel pairs values by their place in memory, which in another class's checkpoint is another.
        for name, moment in state.items():
            if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
    _step_on_contiguous_views(optimizer)


def hand_back_gradients(optimizer: torch.optim.Optimizer, give_back: Callable[[torch.Tensor], None]) -> None:
    """Have `zero_grad` hand over the gradients that nobody else holds, before it forgets them.

    On a CPU, fresh memory costs more than what is written to it: the system clears it page by page.

    Args:
        optimizer: Its `zero_grad` is replaced.
        give_back: Called with each such gradient, contiguous.
    """
    if not hasattr(torch.Tensor, "_use_count"):  # without it views would not be seen
        return
    stock = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        if set_to_none:
            gradient = torch.empty(0)
            alone = _holders(gradient)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    gradient, parameter.grad = parameter.grad, None
                    if type(gradient) is torch.Tensor and _holders(gradient) == alone:
                        give_back(_contiguous_view(gradient))
        stock(set_to_none)

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many references to it there are in Python, and in torch, where each view of it is one."""
    return sys.getrefcount(tensor), tensor._use_count()  # type: ignore[attr-defined]


def _step_on_contiguous_views(optimizer: torch.optim.Adam) -> None:
    """Hand transposed matrices to the kernel as what they are in memory.

    On a CPU the fused kernel copies whatever is not contiguous there and back. The encoder is stored by
    latent, so its transpose is contiguous, and so are those of its gradient and its moments; to an
    elementwise update the order of the elements is all the same.
    """
    stock = getattr(optimizer, "_init_group", None)
    if stock is None:
        return

    def init_group(group: dict[str, Any], *lists: list[torch.Tensor]) -> Any:
        result = stock(group, *lists)
        for tensors in lists:
            tensors[:] = [_contiguous_view(tensor) for tensor in tensors]
        return result

    optimizer._init_group = init_group  # type: ignore[method-assign]


def _contiguous_view(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous():
        return tensor.detach().T
    return tensor
