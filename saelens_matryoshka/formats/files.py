"""Reading files that others made.

A file is hostile until proven otherwise. Sizes and shapes come out of a file's header and are checked before
its tensors are read into memory; pickles are read with `weights_only=True`, and only where what they declare
is what the file holds; whatever is wrong is one `FormatError` that names the file.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from saelens_matryoshka.files.plain_yaml import MAX_YAML_BYTES, plain_values

MAX_CONFIG_BYTES = 4 << 20
# A compressed .npz of weights is about as large as the weights; this leaves room for many zeros.
MAX_COMPRESSION = 20
_MAX_MESSAGE = 1000

Shapes = Mapping[str, tuple[str | int, ...]]


class FormatError(ValueError):
    """A file that is not what its format says, or a model that a format cannot carry.

    The message may quote a file, which may hold anything: it is cut to a length that can be read, and what
    would steer a terminal is written out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
        super().__init__("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message))


# ---- configs


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: it is larger than any config, or not a JSON object.
    """
    text = _config_text(path, MAX_CONFIG_BYTES)
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from None
    return _mapping(loaded, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values.

    Raises:
        FormatError: it is larger than any config, or not a mapping of plain values.
    """
    text = _config_text(path, MAX_YAML_BYTES)
    try:
        loaded = plain_values(text)
    except ValueError as error:
        raise FormatError(f"{path} is not a plain YAML file: {error}.") from None
    return _mapping(loaded, path)


def _config_text(path: Path, limit: int) -> str:
    size = path.stat().st_size
    if size > limit:
        raise FormatError(f"{path} has {size:,} bytes, and a config has at most {limit:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path} is no text in UTF-8, as a config is.") from None


def _mapping(loaded: Any, path: Path) -> dict[str, Any]:
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, where settings by name are expected.")
    return loaded


def field(config: Mapping[str, Any], name: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """The value of a config's field.

    Raises:
        FormatError: the field is missing or of another type.
    """
    value = config.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise FormatError(f"{path}: {name}={value!r}, where {expected} is expected.")
    return value


def require_k(k: Any, d_sae: int, named: str) -> int:
    """The k of a TopK coder, as a config has it.

    Raises:
        FormatError: it is no whole number from 1 to d_sae; the message begins with `named`.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= d_sae:
        raise FormatError(f"{named}={k!r} must be in 1 .. {d_sae}.")
    return k


# ---- tensors


def read_safetensors(path: Path, shapes: Shapes, optional: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, once its header has been found to describe them.

    Args:
        path: The file.
        shapes: Every tensor the file may hold, with its dimensions: numbers, or names that must stand for the
            same number everywhere. `()` is a scalar.
        optional: Which of them may be absent.

    Raises:
        FormatError: the file is truncated or no safetensors file, a tensor is missing, unknown, not of
            floating point or of another shape, or a value is NaN or infinite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            check_shapes({n: tuple(s.get_shape()) for n, s in slices.items()}, shapes, optional, path)
            return _finite({name: file.get_tensor(name) for name in slices}, path)
    except (SafetensorError, OSError) as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: Exception) -> FormatError:
    """What is wrong with a safetensors file. Of one that may not be read, safetensors says there is none."""
    if path.is_file() and not os.access(path, os.R_OK):
        return FormatError(f"{path} may not be read by this user: ask its owner for permission.")
    return FormatError(f"{path} is truncated or not a safetensors file: {error}.")


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name.

    Raises:
        FormatError: the file is truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unread(path, error) from None


def read_npz(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file. Arguments and errors as for `read_safetensors`."""
    try:
        with zipfile.ZipFile(path) as archive:
            found, total = {}, 0
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as file:
                    shape, dtype = _array_header(file, name, path)
                if name in found:
                    raise FormatError(f"{path} holds two arrays {name!r}.")
                if dtype.kind != "f" or dtype.itemsize > 8:
                    raise FormatError(f"{path}: array {name!r} holds {dtype}, and weights are floats.")
                found[name] = shape
                total += math.prod(shape) * dtype.itemsize
    except FormatError:
        raise
    except Exception as error:  # a damaged archive fails in every way there is
        raise FormatError(f"{path} is truncated or not an .npz file: {error}.") from None
    size = path.stat().st_size
    if total > MAX_COMPRESSION * size:
        raise FormatError(f"{path} has {size:,} bytes and declares {total:,}, as weights never would.")
    check_shapes(found, shapes, (), path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: _to_torch(arrays[name]) for name in found}
    except MemoryError:  # which says nothing of the file
        raise
    except Exception as error:
        raise FormatError(f"{path} is truncated or not an .npz file: {error}.") from None
    return _finite(loaded, path)


def _array_header(file: IO[bytes], name: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that an array of an .npz file declares."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    except Exception:  # a header is a Python literal, and numpy's parser fails on it in every way there is
        raise FormatError(f"{path}: array {name!r} has a damaged header; is it of numpy.savez?") from None
    return shape, dtype


def _to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def read_pickle(
    path: Path, shapes: Shapes, optional: Iterable[str] = (), integers: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of a `torch.save` file, without running anything it says.

    Arguments and errors as for `read_safetensors`; a dictionary that holds the tensors under "state_dict",
    "model_state_dict" or "sae" is unwrapped.

    Args:
        integers: Which of the tensors are integers.
    """
    tensors = _unpickle(path)
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, optional, path)
    for name, tensor in tensors.items():
        _check_storage(name, tensor, path)
    kept = frozenset(integers)
    floats = _finite({name: t for name, t in tensors.items() if name not in kept}, path)
    return floats | {name: t.clone() for name, t in tensors.items() if name in kept}


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise FormatError(
            f"{path} is truncated, or not a file of torch.save (of version 1.6 or later)."
        ) from None
    declared = sum(entry.file_size for entry in entries)
    if declared > path.stat().st_size or any(entry.compress_type for entry in entries):
        raise FormatError(f"{path} is compressed, which torch.save never does; it is not read.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:  # which says nothing of the file
        raise
    except Exception as error:  # torch lets through whatever a damaged pickle fails with
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path} holds more than tensors, or is damaged, so it is not read: {reason} "
            "If you trust its author, save its state_dict again with torch.save."
        ) from None
    for wrapper in ("state_dict", "model_state_dict", "sae"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded:
        raise FormatError(f"{path} holds a {type(loaded).__name__}, where tensors by name are expected.")
    unnamed = [name for name in loaded if not isinstance(name, str)]
    if unnamed:
        raise FormatError(f"{path}: a tensor is called {unnamed[0]!r}, where a name is expected.")
    odd = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise FormatError(f"{path}: {odd[0]!r} is a {type(loaded[odd[0]]).__name__}, not a tensor.")
    return dict(loaded)


def _check_storage(name: str, tensor: torch.Tensor, path: Path) -> None:
    # A few stored bytes can be declared to be a tensor of any size by strides of 0.
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise FormatError(f"{path}: tensor {name!r} is not a plain dense tensor.")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise FormatError(
            f"{path}: tensor {name!r} of shape {tuple(tensor.shape)} has only {stored:,} bytes behind it."
        )


def check_shapes(
    found: Mapping[str, tuple[int, ...]], shapes: Shapes, optional: Iterable[str], path: Path
) -> None:
    """Compare the tensors that a file holds with those that its format has.

    Raises:
        FormatError: see `read_safetensors`.
    """
    missing = sorted(shapes.keys() - found.keys() - frozenset(optional))
    if missing:
        raise FormatError(
            f"{path}: there is no tensor {missing[0]!r}; it holds {', '.join(sorted(found)[:12]) or 'none'}. "
            "Is this the format it is said to be?"
        )
    unknown = sorted(found.keys() - shapes.keys())
    if unknown:
        raise FormatError(
            f"{path}: tensor {unknown[0]!r} is not part of this format, which has {', '.join(shapes)}."
        )
    dims: dict[str, int] = {}
    for name, expected in shapes.items():
        if name not in found:
            continue
        shape = found[name]
        fits = len(shape) == len(expected) and all(
            size == (dims.setdefault(dim, size) if isinstance(dim, str) else dim) and size > 0
            for size, dim in zip(shape, expected, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{dim}={dims[dim]}" if dim in dims else str(dim) for dim in expected)
            raise FormatError(f"{path}: tensor {name!r} has shape {list(shape)}, expected [{wanted}].")


def _finite(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Copies in memory, all of floating point and finite."""
    copies = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FormatError(f"{path}: tensor {name!r} holds {tensor.dtype}, and weights are floats.")
        if tensor.element_size() < 2:
            tensor = tensor.to(torch.float32)  # float8 has no arithmetic
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{path}: tensor {name!r} has NaN or infinite values.")
        copies[name] = tensor.clone(memory_format=torch.contiguous_format)
    return copies
