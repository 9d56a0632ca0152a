"""GPUs that are not there: CPU tensors that say they are on cuda:0 or cuda:1, and behave as if.

Within `PretendGPUs`, code that asks for "cuda" gets it. A tensor's memory carries the device it is pretended
to be on; views and in-place results share memory, and so the device. Every operator that torch dispatches,
those of the backward pass too, is looked at before it runs on the CPU:

- tensors on different devices raise what torch raises, but where it takes a CPU scalar;
- what a GPU has no kernel for raises, as far as it is listed here; so does reading a GPU's memory with numpy;
- what makes the host wait for the GPU is noted, with the line that did it (`waiting`).

What it cannot show: the speed and rounding of a GPU, what its kernels refuse beyond the list, the order of
streams, NCCL, `torch.compile`, and how much memory is in use. Random numbers are the CPU's, so that a run on
a pretended GPU can be compared with one on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
# Of memory that torch made inside an operator, on the device it was then at work on.
_ANYWHERE = torch.device("meta")

# What the host has to know the result, or the size of the result, of.
_WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique, aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.unique_dim_consecutive),
    *(aten._coalesce,),
}
# Taken by operators on a GPU from the CPU: the whole argument, or its entries.
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_ACROSS = {aten.copy_, aten._to_copy}
# Whose CPU scalars become arguments of the kernel, besides all that is computed entry by entry.
_WITH_SCALARS = {
    aten.where,
    aten.fill_,
    aten.masked_fill,
    aten.masked_fill_,
    aten.index_fill_,
    aten._fused_adam_,
}
_COPY = "copy between devices"
# Without a kernel for GPUs: nonzero_static before torch 2.7, products of entries in bfloat16 before mid-2026.
_CPU_ONLY = {aten.histogram, aten._histogramdd_bin_edges, aten._histogramdd_from_bin_cts, aten.nonzero_static}
_NOT_IN_BFLOAT16 = {aten._embedding_bag_per_sample_weights_backward}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.vdot}
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
_OF_THE_ARGUMENT = ("empty", "full", "ones", "rand", "randint", "randn", "zeros")


class Wait(NamedTuple):
    """The host waiting for a GPU."""

    what: str
    where: str
    """file:line of the code that called torch"""


class PretendGPUs(TorchDispatchMode):
    """Within, there are GPUs. Enter with `with`, on one thread; threads started meanwhile have them too.

    Args:
        n: How many.
        float64: Whether they have it, which Apple's do not.
    """

    def __init__(self, n: int = 2, *, float64: bool = True) -> None:
        super().__init__()
        self.n, self.float64 = n, float64
        self.waits: list[Wait] = []
        self._patches = pytest.MonkeyPatch()
        self._serializer: Any = None

    # ---- what a test looks at

    @contextlib.contextmanager
    def waiting(self) -> Iterator[list[Wait]]:
        """Within, the list that is given grows by every wait."""
        before, self.waits = self.waits, []
        try:
            yield self.waits
        finally:
            self.waits = before

    # ---- entering

    def __enter__(self) -> PretendGPUs:
        self._patch_torch()
        self._serializer = (0, self._location, self._restore)
        torch.serialization.register_package(*self._serializer)
        run = threading.Thread.run

        def run_with_gpus(thread: threading.Thread) -> None:
            with self._on_this_thread():
                run(thread)

        self._patches.setattr(threading.Thread, "run", run_with_gpus)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.serialization._package_registry.remove(self._serializer)
        self._patches.undo()

    @contextlib.contextmanager
    def _on_this_thread(self) -> Iterator[None]:
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    # ---- operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if any(_real_device(tensor) != CPU for tensor in given):  # of torch's own pretences
            return func(*args, **kwargs)
        packet, places = func.overloadpacket, [_place(tensor) for tensor in given]
        place = self._common_place(func, given, places)
        if place.type == "cuda":
            _refuse(packet, given)
            self._note_waits(packet, args, kwargs)
        if packet is aten.copy_ and places[0] != places[1] and not (len(args) > 2 and args[2]):
            self._wait(_COPY)
        out = func(*args, **kwargs)
        known = {id(storage) for tensor in given for storage in _storages(tensor)}
        for tensor in _tensors(out):
            if any(id(storage) not in known for storage in _storages(tensor)):
                self._put(tensor, place if given else _ANYWHERE)
        return out

    def _put(self, tensor: torch.Tensor, place: torch.device) -> None:
        if place.type == "cuda" and tensor.dtype == torch.float64 and not self.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none.")
        _put(tensor, place)

    def _common_place(self, func: Any, given: list[torch.Tensor], places: list[torch.device]) -> torch.device:
        """The device an operator works on.

        Raises:
            RuntimeError: its tensors are not on one.
        """
        packet = func.overloadpacket
        if packet in _ACROSS:
            return places[0]
        gpus = {place for place in places if place.type == "cuda"}
        if not gpus:
            return CPU
        scalars = torch.Tag.pointwise in func.tags or packet in _WITH_SCALARS
        found = set(gpus)
        for position, (tensor, place) in enumerate(zip(given, places, strict=True)):
            indexes = packet in _INDEXING and position > 0
            if place == CPU and not indexes and not (scalars and tensor.dim() == 0):
                found.add(place)
        written = func._schema.name.endswith("_") and places[0] == CPU
        if len(found) > 1 or written:
            names = sorted(map(str, found | ({CPU} if written else set())), reverse=True)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{names[0]} and {names[1]}! (in {func})"
            )
        return next(iter(gpus))

    def _note_waits(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if packet in _WAITING:
            self._wait(packet.__name__)
        elif packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self._wait("repeat_interleave")
        elif packet is aten.sum and args[0].is_sparse and len(args) > 1:
            self._wait("coalesce")  # which follows a sum over some of the sparse dimensions
        elif packet in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
            values = args[2:3]
            if len(args[1]) == 1 and masks and [_place(v) for v in values if v.numel() == 1] == [CPU]:
                return  # becomes masked_fill_
            for moved in (*indices, *values):
                if _place(moved) == CPU:
                    self._wait(_COPY)
            for _ in masks:
                self._wait("nonzero")

    def _wait(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_back and (
            frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename
        ):
            frame = frame.f_back
        self.waits.append(Wait(what, f"{frame.f_code.co_filename}:{frame.f_lineno}"))

    # ---- what Python asks of torch

    def _patch_torch(self) -> None:
        patch = functools.partial(self._patches.setattr, torch.Tensor)
        patch("device", property(_device))
        for kind in ("cuda", "cpu"):
            patch(f"is_{kind}", property(lambda tensor, kind=kind: _device(tensor).type == kind))
        patch("get_device", lambda tensor: -1 if _device(tensor).index is None else _device(tensor).index)
        patch("to", self._to(torch.Tensor.to))
        patch(
            "cuda", lambda tensor, device=None, **how: tensor.to("cuda" if device is None else device, **how)
        )
        patch("cpu", lambda tensor: tensor.to("cpu"))
        patch("pin_memory", lambda tensor: tensor)
        patch("numpy", _refusing_gpus(torch.Tensor.numpy))
        patch("__array__", _refusing_gpus(torch.Tensor.__array__))
        patch("tolist", self._waiting_once(torch.Tensor.tolist))
        patch("__deepcopy__", _staying(torch.Tensor.__deepcopy__))
        patch("new_tensor", self._new_tensor(torch.Tensor.new_tensor))
        for name in _OF_THE_ARGUMENT:
            if hasattr(torch.Tensor, f"new_{name}"):
                patch(f"new_{name}", self._made(getattr(torch.Tensor, f"new_{name}"), like=True))
            like = getattr(torch, f"{name}_like")
            self._patches.setattr(torch, f"{name}_like", self._made(like, like=True))
        for factory in _device_constructors():
            if getattr(torch, factory.__name__, None) is factory:
                self._patches.setattr(torch, factory.__name__, self._made(factory))
        self._patch_cuda()

    def _patch_cuda(self) -> None:
        answers: dict[str, Any] = {
            "is_available": True,
            "is_initialized": True,
            "is_bf16_supported": True,
            "device_count": self.n,
            "current_device": 0,
            "set_device": None,
            "empty_cache": None,
            "ipc_collect": None,
            "get_device_name": "Pretended GPU",
            "get_device_capability": (9, 0),
            "mem_get_info": (70 << 30, 80 << 30),
            "memory_allocated": 0,
            "max_memory_allocated": 0,
            "reset_peak_memory_stats": None,
            "manual_seed": None,
            "manual_seed_all": None,
            "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8) for _ in range(self.n)],
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": None,
        }
        for name, answer in answers.items():
            self._patches.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        self._patches.setattr(torch.cuda, "synchronize", lambda *_: self._wait("synchronize"))
        self._patches.setattr(torch, "Generator", _Generator)
        self._patches.setattr(torch, "autocast", _Autocast)
        self._patches.setattr(torch.amp, "autocast", _Autocast)
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        self._patches.setattr(torch, "is_autocast_enabled", lambda *_: enabled("cpu"))
        self._patches.setattr(torch, "get_autocast_dtype", lambda *_: dtype("cpu"))
        self._patches.setattr(torch._C, "_group_tensors_by_device_and_dtype", _grouped)

    def named(self, device: Any) -> torch.device:
        """A device as a tensor's `device` says it."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        index = device.index or 0
        if index >= self.n:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def _made(self, factory: Callable[..., Any], *, like: bool = False) -> Callable[..., Any]:
        """A factory, which puts what it makes where its `device` says; on the CPU, or where another is."""

        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            device = kwargs.pop("device", None)
            if device is None and not like:
                device = _device_of_context()
            of_tensors = any(isinstance(arg, torch.Tensor) for arg in args)
            if device is None and (like or of_tensors):
                return factory(*args, **kwargs)
            device = CPU if device is None else self.named(device)
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != device.type:
                raise RuntimeError(
                    f"Expected a '{device.type}' device type for generator but found "
                    f"'{generator.device.type}'"
                )
            if device.type not in ("cpu", "cuda"):
                return factory(*args, device=device, **kwargs)
            with torch._C.DisableTorchFunction():  # nothing is to choose another device
                made = factory(*args, device=CPU, **kwargs)
            if factory in _FROM_DATA and of_tensors:
                return made.to(device)
            if factory in _FROM_DATA and device.type == "cuda":
                self._wait(_COPY)
            self._put(made, device)
            return made

        return make

    def _new_tensor(self, new_tensor: Callable[..., Any]) -> Callable[..., Any]:
        def new(tensor: torch.Tensor, data: Any, **kwargs: Any) -> torch.Tensor:
            device = self.named(kwargs.pop("device", None) or tensor.device)
            made = new_tensor(tensor, data, **kwargs)
            if device.type == "cuda":
                self._wait(_COPY)
            self._put(made, device)
            return made

        return new

    def _to(self, to: Callable[..., Any]) -> Callable[..., Any]:
        def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            copy = kwargs.pop("copy", False)
            if args and isinstance(args[0], torch.Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            if "other" in kwargs:
                other = kwargs.pop("other")
                args = (other.device, other.dtype)
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            device = None if device is None else self.named(device)
            how: dict[str, Any] = {"dtype": dtype or tensor.dtype, "copy": copy}
            if memory_format is not None:
                how["memory_format"] = memory_format
            if device in (None, tensor.device):
                return to(tensor, **how)
            assert device is not None
            if "meta" in (device.type, tensor.device.type):
                return to(tensor, device=device, **how)
            from_gpu = tensor.device.type == "cuda"
            if from_gpu or not non_blocking:
                self._wait(_COPY)
            moved = _Move.apply(to, tensor, device, how)
            assert isinstance(moved, torch.Tensor)
            return moved

        return move

    def _waiting_once(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor) -> Any:
            if tensor.is_cuda:
                self._wait(method.__name__)
            return method(tensor)

        return read

    # ---- files

    def _location(self, storage: Any) -> str | None:
        place = getattr(storage, "_pretended", CPU)
        return str(place) if place.type == "cuda" else None

    def _restore(self, storage: Any, location: str) -> Any:
        if not str(location).startswith("cuda"):
            return None
        storage._pretended = self.named(location)
        return storage


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, to: Any, tensor: torch.Tensor, device: torch.device, how: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.home, ctx.dtype = tensor.device, tensor.dtype
        moved = to(tensor, **{**how, "copy": True})
        _put(moved, device)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return None, grad.to(ctx.home, ctx.dtype), None, None


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made._device = torch.device(device)  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:
        return self._device  # type: ignore[attr-defined]


class _Autocast(torch.amp.autocast_mode.autocast):
    def __init__(self, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        super().__init__(device_type, dtype, *args, **kwargs)


# ---- where a tensor is

_device_getter = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


def _real_device(tensor: torch.Tensor) -> torch.device:
    return _device_getter(tensor)


def _device(tensor: torch.Tensor) -> torch.device:
    real = _real_device(tensor)
    place = _place(tensor) if real == CPU else real
    return CPU if place == _ANYWHERE and real == CPU else place


def _place(tensor: torch.Tensor) -> torch.device:
    return getattr(next(_storages(tensor)), "_pretended", CPU)


def _put(tensor: torch.Tensor, place: torch.device) -> None:
    for storage in _storages(tensor):
        storage._pretended = place  # type: ignore[attr-defined]


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Those of the values first."""
    if tensor.layout == torch.strided:
        yield tensor.untyped_storage()
        return
    with torch._C._DisableTorchDispatch():
        if tensor.layout == torch.sparse_coo:
            parts = (tensor._values(), tensor._indices())
        else:
            parts = (tensor.values(), tensor.crow_indices(), tensor.col_indices())
    for part in parts:
        yield part.untyped_storage()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _refuse(packet: Any, given: list[torch.Tensor]) -> None:
    """Raise what a GPU has no kernel for."""
    if packet in _CPU_ONLY:
        raise NotImplementedError(f"Could not run '{packet}' with arguments from the 'CUDA' backend.")
    without_kernel = (packet in _PRODUCTS and not given[-1].is_floating_point()) or (
        packet in _NOT_IN_BFLOAT16 and given[0].dtype == torch.bfloat16
    )
    if without_kernel:
        raise RuntimeError(f'"{packet.__name__}_cuda" not implemented for {given[-1].dtype}')


def _refusing_gpus(method: Callable[..., Any]) -> Callable[..., Any]:
    def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_cuda:
            raise TypeError(
                f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        return method(tensor, *args, **kwargs)

    return read


def _staying(deepcopy: Callable[..., Any]) -> Callable[..., Any]:
    def copy(tensor: torch.Tensor, memo: Any) -> Any:
        place, made = _place(tensor), deepcopy(tensor, memo)
        if _real_device(made) == CPU:
            _put(made, place)
        return made

    return copy


def _device_of_context() -> torch.device | None:
    """That of `with torch.device(...)`."""
    modes = _get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)


def _grouped(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """Tensors by device and dtype, which torch does in C++."""
    found: dict[Any, Any] = {}
    for index in range(max(map(len, lists), default=0)):
        row = [tensors[index] if tensors else None for tensors in lists]
        first = next(tensor for tensor in row if tensor is not None)
        columns, indices = found.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for tensors, column, tensor in zip(lists, columns, row, strict=True):
            if tensors:
                column.append(tensor)
        if with_indices:
            indices.append(index)
    return found
