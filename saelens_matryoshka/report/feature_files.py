"""circuit-tracer's feature files: what its graph viewer shows beside a graph, read by byte range.

    features/index.json.gz   {"8": {"filename": "layer_8.bin", "offsets": [F + 1 numbers]}, ...}, per layer
    features/layer_8.bin     per latent a uint32 (little-endian) length and so much of zlib-compressed JSON

A latent's JSON: its strongest examples and those of each interval of activation, top and bottom logits, the
histogram of its activations over [act_min, act_max], their percentiles, and the share of tokens it fires on.
`act_max` is the upper end of the last filled bin.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any

import filelock
import torch

from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.report.logits import LogitEffects
from saelens_matryoshka.report.samples import Example, Samples
from saelens_matryoshka.report.text import TokenText

INDEX = "index.json.gz"
LOCK = ".lock"
"""held by who changes the index"""


def require_new_layer(folder: Path, layer: int) -> None:
    """Refuse a layer that is there.

    Raises:
        ValueError: the folder has feature files of this layer, or an index that cannot be read.
    """
    if str(layer) in _read_index(folder):
        raise ValueError(
            f"{folder} has feature files of layer {layer}: give another folder, or remove it first."
        )


def write_feature_files(
    samples: Samples,
    text: TokenText,
    folder: Path,
    *,
    layer: int,
    transcoder_id: str,
    logits: LogitEffects | None,
) -> None:
    """Add a layer to a folder, which is made if need be. The index is written last, and whole.

    Several processes may each add a layer to one folder.

    Args:
        samples: Of all latents.
        text: Of the tokens.
        folder: `features` in the folder of the transcoder set.
        layer: Which layer.
        transcoder_id: Name of the transcoder, as the viewer shows it.
        logits: Top and bottom logits; None where it writes to something without logits.

    Raises:
        ValueError: the folder has feature files of this layer.
    """
    require_new_layer(folder, layer)
    folder.mkdir(parents=True, exist_ok=True)
    name, offsets = f"layer_{layer}.bin", [0]
    temporary = folder / f".{name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            for latent in range(samples.d_sae):
                feature = _feature(samples, text, latent, logits, transcoder_id)
                packed = zlib.compress(dumps(feature, ensure_ascii=False).encode())
                file.write(struct.pack("<I", len(packed)) + packed)
                offsets.append(file.tell())
        with filelock.FileLock(folder / LOCK):
            require_new_layer(folder, layer)
            os.replace(temporary, folder / name)
            index = _read_index(folder) | {str(layer): {"filename": name, "offsets": offsets}}
            ordered = dict(sorted(index.items(), key=lambda entry: int(entry[0])))
            write_atomically(folder / INDEX, gzip.compress(json.dumps(ordered).encode()))
    finally:
        temporary.unlink(missing_ok=True)


def read_feature(folder: Path, layer: int, latent: int) -> dict[str, Any]:
    """One latent's JSON, as the viewer finds it.

    Raises:
        ValueError: there is none.
    """
    entry = _read_index(folder).get(str(layer))
    if entry is None or not 0 <= latent < len(entry["offsets"]) - 1:
        raise ValueError(f"{folder} has no feature file of layer {layer}, latent {latent}.")
    with (folder / entry["filename"]).open("rb") as file:
        file.seek(entry["offsets"][latent])
        (length,) = struct.unpack("<I", file.read(4))
        return json.loads(zlib.decompress(file.read(length)))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        return dict(json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no index of feature files that can be read: {error}.") from None


def _feature(
    samples: Samples, text: TokenText, latent: int, logits: LogitEffects | None, transcoder_id: str
) -> dict[str, Any]:
    seen: set[tuple[int, ...]] = set()
    groups = [("Top activations", samples.top_of(latent))]
    groups += [
        (f"Activations {interval.low:.3g} to {interval.high:.3g}", interval.examples)
        for interval in samples.intervals_of(latent)
        if interval.examples
    ]
    counts = samples.histogram[latent]
    filled = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
    width = samples.scale[latent].item() / len(counts)
    return {
        "transcoder_id": transcoder_id,
        "index": latent,
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(example, text, seen) for example in examples]}
            for name, examples in groups
        ],
        "top_logits": _tokens(logits.top_tokens[latent], text) if logits else [],
        "bottom_logits": _tokens(logits.bottom_tokens[latent], text) if logits else [],
        "act_min": 0.0,
        "act_max": filled * width,
        "quantile_values": _percentiles(counts[:filled], width),
        "histogram": counts[:filled].tolist(),
        "activation_frequency": samples.density[latent].item(),
    }


def _tokens(tokens: torch.Tensor, text: TokenText) -> list[str]:
    return [text.string_of(token) for token in tokens.tolist()]


def _example(example: Example, text: TokenText, seen: set[tuple[int, ...]]) -> dict[str, Any]:
    context = tuple(example.tokens)
    repeated = context in seen
    seen.add(context)
    return {
        "tokens": [text.string_of(token) for token in example.tokens],
        "tokens_acts_list": [round(value, 4) for value in example.activations],
        "train_token_ind": example.index,
        "is_repeated_datapoint": repeated,
    }


def _percentiles(counts: torch.Tensor, width: float) -> list[float]:
    """The 1st to the 100th percentile of the activations, interpolated within the bins."""
    if not len(counts):
        return []
    below = torch.cat([torch.zeros(1, dtype=torch.float64), counts.double().cumsum(0)])
    wanted = torch.arange(1, 101, dtype=torch.float64) / 100 * below[-1]
    index = torch.searchsorted(below[1:].contiguous(), wanted).clamp(max=len(counts) - 1)
    inside = (wanted - below[index]) / counts[index].double().clamp(min=1)
    return ((index + inside) * width).tolist()
