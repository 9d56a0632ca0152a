"""What can be wrong with a file: raw bytes, config fields, tensors' headers, archives' entries, pickles."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.fuzz.choices import Choices

_NUMBERS = (0, 1, -1, 2, 3, 4, 8, 255, *(1 << bits for bits in (16, 24, 31, 40, 63, 200)), (1 << 64) - 1)
_FLOATS = (0.5, -0.0, 1e308, -1e-308, float("nan"), float("inf"), 3.0)
_TEXTS = (
    "", "x", "none", "layer_norm", "hook_z", "float16", "bfloat16", "float64", "cuda", "meta", "jumprelu",
    "topk", "standard", "gated", "batchtopk", "transcoder", "skip_transcoder", "matryoshka_sae", "temporal",
    "../../x", "/etc/passwd", "hf://a/b/c", "blocks.0.attn.hook_z", "blocks.-1.x", "\x00", "é" * 9,
    "x" * 70000, "\ud800", "\x1b[31m", "[red]", "dataset-wise", "token-wise", "inference", "relu",
    "inf", "1e999", "a\nb",
)  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4", "x", "")
_ANY = tuple(struct.pack("<Q", n % (1 << 64)) for n in _NUMBERS)


def corrupt(path: Path, choices: Choices) -> None:
    """Change one file for the worse."""
    kinds: list[Callable[[Path, Choices], None]] = [_replace_bytes]
    by_suffix: dict[str, Callable[[Path, Choices], None]] = {
        ".json": _config,
        ".yaml": _config,
        ".safetensors": _safetensors,
        ".npz": _npz,
        ".pt": _torch_file,
    }
    kinds += 3 * [by_suffix[path.suffix]] + [_odd_file]
    kind = kinds[choices.integer(0, len(kinds) - 1)]
    try:
        kind(path, choices)
    except Exception:  # it was damaged before, so that it cannot be taken apart
        _replace_bytes(path, choices)


# ---- any file


def _replace_bytes(path: Path, choices: Choices) -> None:
    content = path.read_bytes() if path.is_file() else b""
    for _ in range(choices.integer(1, 4)):
        at = choices.integer(0, max(0, len(content) - 1))
        length = choices.pick((0, 1, 2, 4, 8, 64))
        new = choices.pick((choices.bytes(1), choices.bytes(4), choices.pick(_ANY), b"", b"\x00" * 64))
        content = content[:at] + new + content[at + length :]
    path.write_bytes(content)


def _odd_file(path: Path, choices: Choices) -> None:
    """Missing, empty, cut off, a folder, another file, or text without end."""
    content = path.read_bytes()
    kind = choices.integer(0, 6)
    path.unlink()
    if kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.write_bytes(content[: choices.integer(0, len(content))])
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        others = [other for other in sorted(path.parent.iterdir()) if other.is_file()]
        path.write_bytes(choices.pick(others).read_bytes() if others else b"")
    elif kind == 5:
        path.write_bytes(choices.pick((b"[", b'{"a":', b"a: &a [*a, ", b"- ")) * 20_000)
    elif kind == 6:
        path.write_bytes(content + choices.bytes(choices.integer(1, 64)))


# ---- JSON and YAML


def _value(choices: Choices, depth: int = 0) -> Any:
    kind = choices.integer(0, 7 if depth < 3 else 4)
    if kind == 0:
        return choices.pick((None, True, False))
    if kind in (1, 2):
        return choices.pick(_NUMBERS) * choices.pick((1, -1))
    if kind == 3:
        return choices.pick(_FLOATS)
    if kind == 4:
        return choices.pick(_TEXTS)
    if kind == 5:
        return [_value(choices, depth + 1) for _ in range(choices.integer(0, 3))]
    if kind == 6:
        return {choices.pick(_TEXTS): _value(choices, depth + 1) for _ in range(choices.integer(0, 3))}
    return choices.pick(([2, 8], [8], [2, 6], [2, 2, 8], [8, 2], [1] * 8, ["2", "8"], [2.0, 8.0], [True, 8]))


def _config(path: Path, choices: Choices) -> None:
    changed = _changed(yaml.safe_load(path.read_text()), choices)
    text = json.dumps(changed) if path.suffix == ".json" else yaml.safe_dump(changed)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _changed(loaded: Any, choices: Choices) -> Any:
    """The same with one value replaced, removed or added, anywhere in it."""
    if isinstance(loaded, dict) and loaded:
        key = choices.pick(sorted(loaded, key=str))
        action = choices.integer(0, 9)
        if action == 0:
            return {k: v for k, v in loaded.items() if k != key}
        if action == 1:
            return {**loaded, choices.pick(_TEXTS): _value(choices)}
        if action == 2:
            return _value(choices)
        if isinstance(loaded[key], dict | list) and action > 4:
            return {**loaded, key: _changed(loaded[key], choices)}
        return {**loaded, key: _value(choices)}
    if isinstance(loaded, list) and loaded:
        at = choices.integer(0, len(loaded) - 1)
        return [*loaded[:at], _value(choices), *loaded[at + choices.integer(0, 1) :]]
    return _value(choices)


# ---- safetensors


def _safetensors(path: Path, choices: Choices) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    tensors = [name for name in header if name != "__metadata__"] or ["none"]
    name = choices.pick(sorted(tensors))
    entry = header.get(name)
    if not isinstance(entry, dict):
        entry = header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    action = choices.integer(0, 7)
    if action == 0:
        entry["dtype"] = choices.pick(_DTYPES)
    elif action == 1:
        entry["shape"] = [choices.pick(_NUMBERS) for _ in range(choices.integer(0, 4))]
    elif action == 2:
        entry["data_offsets"] = [choices.pick(_NUMBERS), choices.pick(_NUMBERS)]
    elif action == 3:
        header[choices.pick(_TEXTS)] = header.pop(name)
    elif action == 4:
        del header[name]
    elif action == 5:
        header["__metadata__"] = {"saelens_matryoshka": json.dumps(_value(choices)), "format": "pt"}
    elif action == 6:  # the values: NaN, infinity, subnormal
        start = choices.integer(0, max(0, len(body) - 4)) & ~3
        bits = choices.pick((0x7FC00000, 0x7F800000, 1, 0xFF7FFFFF, 0x00800000))
        body = body[:start] + struct.pack("<I", bits) + body[start + 4 :]
    else:  # half of the dimension, consistently or not
        entry["shape"] = list(reversed(entry["shape"])) if isinstance(entry["shape"], list) else []
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    declared = choices.pick(_NUMBERS) if choices.chance(8) else len(text)
    path.write_bytes(struct.pack("<Q", declared % (1 << 64)) + text + body)


# ---- npz


def _npz(path: Path, choices: Choices) -> None:
    entries = _entries(path)
    at = choices.integer(0, len(entries) - 1)
    name, content = entries[at]
    action = choices.integer(0, 6)
    if action == 0:
        entries[at] = (name, _npy_header(choices) + content[128:])
    elif action == 1:
        entries[at] = (choices.pick(_TEXTS).replace("\ud800", "?")[:100] + ".npy", content)
    elif action == 2:
        entries.append((name, content))
    elif action == 3:
        entries[at] = (name, content[: choices.integer(0, len(content))])
    elif action == 4:
        start = choices.integer(0, 127)
        entries[at] = (name, content[:start] + choices.bytes(2) + content[start + 2 :])
    elif action == 5:
        entries[at] = (name, _saved(choices.pick(_ARRAYS)))
    else:
        del entries[at]
    method = choices.pick((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, method)


def _entries(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _npy_header(choices: Choices) -> bytes:
    descr = choices.pick(("<f4", "<f2", ">f4", "<f8", "|O", "<i8", "<U4", "|V9", "<c8", "<f16", "x", "|b1"))
    shape = tuple(choices.pick(_NUMBERS) * choices.pick((1, 1, -1)) for _ in range(choices.integer(0, 3)))
    text = repr({"descr": descr, "fortran_order": choices.pick((False, True, 3)), "shape": shape}).encode()
    if choices.chance(6):
        text = choices.pick((b"{", b"__import__('os').mkdir('harm')", b"{'a': " + b"(" * 200, b"x" * 60_000))
    version = choices.pick((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = struct.pack("<H", len(text)) if version == b"\x01\x00" else struct.pack("<I", len(text))
    if choices.chance(8):
        size = b"\xff" * len(size)
    return b"\x93NUMPY" + version + size + text


_ARRAYS: tuple[np.ndarray, ...] = (
    np.zeros((4, 8), np.float64),
    np.zeros((8, 4), np.float16),
    np.zeros((0, 4), np.float32),
    np.zeros((), np.float32),
    np.zeros(8, np.longdouble),
    np.zeros((4, 8), ">f4"),
    np.asfortranarray(np.ones((4, 8), np.float32)),
    np.full(8, np.nan, np.float32),
    np.zeros((1000, 1000), np.float32),
    np.zeros(8, [("a", np.float32)]),
)


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# ---- torch.save


def _torch_file(path: Path, choices: Choices) -> None:
    if choices.chance(3):
        return _torch_archive(path, choices)
    tensors = torch.load(path, weights_only=True)
    name = choices.pick(sorted(tensors, key=str) or ["none"])
    action = choices.integer(0, 5)
    if action < 3:
        tensors[name] = _object(choices, tensors.get(name))
    elif action == 3:
        tensors[choices.pick((*_TEXTS, 3, None, (1, 2), True))] = tensors.pop(name, torch.zeros(1))
    elif action == 4:
        tensors.pop(name, None)
    else:
        tensors = {choices.pick(("state_dict", "model_state_dict", "sae", "x")): tensors}
    return torch.save(tensors, path, _use_new_zipfile_serialization=not choices.chance(8))


def _object(choices: Choices, old: Any) -> Any:
    tensor = old if isinstance(old, torch.Tensor) and old.layout == torch.strided else torch.ones(8)
    made: list[Callable[[], Any]] = [
        lambda: _value(choices),
        lambda: torch.zeros(1).expand(1 << 40),
        lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
        lambda: torch.ones(8).to_sparse(),
        lambda: torch.ones(4, 8).to_sparse_csr(),
        lambda: torch.zeros(tuple(choices.integer(0, 9) for _ in range(choices.integer(0, 4)))),
        lambda: tensor.to(choices.pick(_TORCH_DTYPES)),
        lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else -tensor,
        lambda: tensor.T if tensor.dim() == 2 else tensor[None],
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.empty(tuple(tensor.shape), device="meta"),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.ones(1000)[: tensor.numel()].as_strided(tuple(tensor.shape), (0,) * tensor.dim()),
        lambda: torch.tensor([choices.pick(_NUMBERS) % (1 << 62), 3]),
        lambda: torch.tensor(-5),
        lambda: torch.nn.Linear(2, 2),
        lambda: np.zeros(3),
        lambda: torch.Size([3]),
        lambda: [tensor] * 3,
        lambda: tensor.to(torch.complex64).conj(),
    ]
    return choices.pick(made)()


_TORCH_DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.uint8,
)  # fmt: skip
_OPCODES = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nload\n",
    b"(", b"t", b"R", b"}", b"]", b"0", b"2", b"h\x00", b"q\x00", b"X\x01\x00\x00\x00a", b"K\x08", b"Q", b".",
    b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8a\xff", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"ccollections\nOrderedDict\n", b"b", b"u", b"s", b"N", b"\x88",
)  # fmt: skip


def _torch_archive(path: Path, choices: Choices) -> None:
    """The entries of the archive, or the pickle's own opcodes."""
    entries = _entries(path)
    pickles = [index for index, (name, _) in enumerate(entries) if name.endswith("data.pkl")]
    at = pickles[0] if pickles and not choices.chance(3) else choices.integer(0, len(entries) - 1)
    name, content = entries[at]
    action = choices.integer(0, 4)
    if action < 3:
        for _ in range(choices.integer(1, 4)):
            start, length = choices.integer(0, len(content)), choices.pick((0, 1, 2, 4))
            new = choices.pick((choices.pick(_OPCODES), choices.bytes(2), choices.pick(_ANY)))
            content = content[:start] + new + content[start + length :]
        entries[at] = (name, content)
    elif action == 3:
        renamed = choices.pick(("x", "data.pkl", "data/0", "version"))
        entries[at] = (f"{name.rpartition('/')[0]}/{renamed}", content)
    else:
        del entries[at]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
