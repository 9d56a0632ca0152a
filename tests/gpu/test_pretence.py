"""The pretended GPUs behave as GPUs do, where the other tests rely on it."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch

from tests.pretend_gpu import PretendGPUs


@pytest.mark.usefixtures("gpus")
def test_results_are_where_their_arguments_are() -> None:
    a = torch.ones(3, 4, device="cuda")
    made = [a, a[1:], a.T, a + 1, torch.zeros_like(a), a.new_zeros(2), a.cuda(), copy.deepcopy(a), a.sum()]
    assert {str(tensor.device) for tensor in made} == {"cuda:0"}
    assert all(tensor.is_cuda and not tensor.is_cpu for tensor in made)
    assert torch.zeros(3).device.type == a.cpu().device.type == "cpu"
    assert a.to("cuda:1").device == torch.device("cuda", 1)
    assert torch.empty_like(a, device="cpu").device.type == "cpu"
    with torch.device("cuda:1"):
        assert torch.nn.Linear(2, 2).weight.device.index == 1
    shape = torch.zeros(2, 3, dtype=torch.long, device="cuda")
    sparse = torch.sparse_coo_tensor(shape, a[0, :3], (3, 4), check_invariants=True)
    assert sparse.is_cuda
    assert sparse.bool().float().sum(0).to_dense().is_cuda
    assert not sparse.cpu().is_cuda


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    "mix",
    [
        lambda a: a + torch.ones(4),
        lambda a: torch.ones(4) * a,
        lambda a: a + torch.ones(4, device="cuda:1"),
        lambda a: a @ torch.ones(4),
        lambda a: torch.ones(4).add_(a[0]),
        lambda a: torch.ones(4)[a.long()],
        lambda a: torch.cat([a, torch.ones(4)]),
        lambda a: torch.stack([a[0], torch.tensor(1.0)]),
    ],
)
def test_tensors_on_different_devices_raise(mix) -> None:
    with pytest.raises(RuntimeError, match="same device.*at least two devices"):
        mix(torch.ones(4, device="cuda"))


@pytest.mark.usefixtures("gpus")
def test_a_scalar_of_the_cpu_and_copies_are_taken() -> None:
    a = torch.ones(4, device="cuda")
    assert (a * torch.tensor(2.0)).is_cuda
    assert torch.where(a > 0, a, torch.tensor(0.0)).is_cuda
    a.copy_(torch.arange(4.0))
    assert torch.zeros(4).copy_(a).tolist() == [0, 1, 2, 3]
    assert a[torch.tensor([2, 3])].tolist() == [2, 3]


@pytest.mark.usefixtures("gpus")
def test_what_a_gpu_cannot_do_raises() -> None:
    a = torch.ones(4, device="cuda")
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        a.numpy()
    with pytest.raises(NotImplementedError, match="histogram"):
        torch.histogram(a, 3)
    with pytest.raises(RuntimeError, match="not implemented"):
        a.long() @ a.long()
    with pytest.raises(RuntimeError, match="device ordinal"):
        torch.ones(4, device="cuda:2")
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(4, device="cuda", generator=torch.Generator())


WAITS = {
    "item": lambda a: a[0].item(),
    "bool": lambda a: bool(a[0] > 0),
    "tolist": lambda a: a.tolist(),
    "to the CPU": lambda a: a.cpu(),
    "to the GPU": lambda a: torch.ones(4).cuda(),  # noqa: ARG005
    "made from a list": lambda a: torch.tensor([1.0], device=a.device),
    "new from a list": lambda a: a.new_tensor([1.0]),
    "copied in": lambda a: a.copy_(torch.ones(4)),
    "nonzero": lambda a: a.nonzero(),
    "mask": lambda a: a[a > 0],
    "list of indices": lambda a: a[[0, 1]],
    "unique": lambda a: a.unique(),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_noted_with_its_line(gpus: PretendGPUs, what: str) -> None:
    a = torch.ones(4, device="cuda")
    with gpus.waiting() as waits:
        WAITS[what](a)
    assert len(waits) == 1
    assert waits[0].where.startswith(__file__)


def test_what_does_not_wait_is_not_noted(gpus: PretendGPUs) -> None:
    a = torch.ones(4, device="cuda")
    with gpus.waiting() as waits:
        a[a > 0] = 0
        a[1:] += a.sum()
        a.topk(2)
        torch.full((3,), 2.0, device="cuda")
        torch.ones(4).to("cuda", non_blocking=True)
        torch.ones(4).nonzero()
        float(torch.ones(()))
    assert waits == []


@pytest.mark.usefixtures("gpus")
def test_a_module_keeps_its_parameters_and_trains() -> None:
    layer = torch.nn.Linear(4, 3)
    weight = layer.weight
    assert layer.cuda().weight is weight
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(2, 4).cuda()).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_cuda
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].is_cuda
    source = torch.ones(2, 4, requires_grad=True)
    layer(source.to("cuda:0")).sum().backward()
    assert source.grad is not None
    assert not source.grad.is_cuda


@pytest.mark.usefixtures("gpus")
def test_files_remember_the_device() -> None:
    file = io.BytesIO()
    torch.save(torch.ones(3, device="cuda:1"), file)
    devices = []
    for where in (None, "cpu", "cuda"):
        file.seek(0)
        devices.append(str(torch.load(file, map_location=where).device))
    assert devices == ["cuda:1", "cpu", "cuda:0"]


@pytest.mark.usefixtures("gpus")
def test_another_thread_has_the_gpus_too() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append((torch.ones(3, device="cuda") + 1).device))
    thread.start()
    thread.join()
    assert found == [torch.device("cuda", 0)]


def test_afterwards_there_are_none() -> None:
    to = torch.Tensor.to
    with PretendGPUs():
        pass
    assert not torch.cuda.is_available()
    assert torch.Tensor.to is to
    assert torch.zeros(3).device.type == "cpu"
