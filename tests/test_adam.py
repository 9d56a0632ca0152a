from __future__ import annotations

import copy
import inspect

import pytest
import torch

from saelens_matryoshka.adam import fuse_adam, hand_back_gradients


def _parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(24, 8).T),  # stored by column, as the encoder is
        torch.nn.Parameter(torch.randn(8, 24)),
        torch.nn.Parameter(torch.randn(24)),
    ]


def _steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("already_stepped", [False, True])
def test_fused_adam_makes_the_same_updates(already_stepped: bool) -> None:
    one, other = _parameters(), _parameters()
    plain, fused = torch.optim.Adam(one, lr=0.01), torch.optim.Adam(other, lr=0.01)
    if already_stepped:
        _steps(plain, one, seed=1)
        _steps(fused, other, seed=1)
    fuse_adam(fused)
    _steps(plain, one, seed=2)
    _steps(fused, other, seed=2)
    for expected, actual in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert actual.stride() == expected.stride()


def test_moments_laid_out_otherwise_in_memory_belong_to_the_same_weights() -> None:
    """As in a checkpoint of SAELens's own class, whose encoder is stored by row."""
    one, other = _parameters(), _parameters()
    plain, fused = torch.optim.Adam(one, lr=0.01), torch.optim.Adam(other, lr=0.01)
    _steps(plain, one, seed=1)
    _steps(fused, other, seed=1)
    for state in fused.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()
    fuse_adam(fused)
    _steps(plain, one, seed=2)
    _steps(fused, other, seed=2)
    for expected, actual in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_state_of_a_fused_adam_loads_into_a_plain_one_and_back() -> None:
    parameters = _parameters()
    fused = torch.optim.Adam(parameters, lr=0.01)
    fuse_adam(fused)
    _steps(fused, parameters, seed=1)
    state = copy.deepcopy(fused.state_dict())
    assert state["state"][0]["exp_avg"].shape == (8, 24)
    again = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in parameters]
    resumed = torch.optim.Adam(again, lr=0.01)
    resumed.load_state_dict(state)
    fuse_adam(resumed)
    _steps(fused, parameters, seed=2)
    _steps(resumed, again, seed=2)
    for expected, actual in zip(parameters, again, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_seam_adam_collects_its_tensors_in_init_group() -> None:
    """If this fails, the fused update still works, but copies the encoder there and back."""
    assert "_init_group" in inspect.getsource(torch.optim.Adam.step)


def test_other_optimizers_are_left_alone() -> None:
    optimizer = torch.optim.SGD(_parameters(), lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    fuse_adam(optimizer)
    assert optimizer.state_dict() == before


def test_gradients_are_handed_back_contiguous_and_only_those_that_nobody_else_holds() -> None:
    parameters = _parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    got: list[int] = []
    hand_back_gradients(
        optimizer, lambda gradient: got.append(gradient.data_ptr()) or _is_contiguous(gradient)
    )
    addresses = []
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)  # as parameters are: the encoder's is transposed
        addresses.append(parameter.grad.data_ptr())
    optimizer.zero_grad()
    assert got == addresses
    assert all(parameter.grad is None for parameter in parameters)

    got.clear()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    held, view = parameters[0].grad, parameters[1].grad[0]
    optimizer.zero_grad()
    assert len(got) == 1, "the bias's only"
    assert held is not None
    assert held.sum() == held.numel()
    assert view.sum() == view.numel()

    got.clear()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.zero_grad(set_to_none=False)
    assert not got, "it is still the parameter's"
    assert torch.equal(parameters[0].grad, torch.zeros_like(parameters[0]))


def _is_contiguous(gradient: torch.Tensor) -> None:
    assert gradient.is_contiguous()
