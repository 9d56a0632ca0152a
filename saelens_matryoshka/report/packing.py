"""The latents of a page as one compressed block of typed arrays, and the layout its script reads them by.

Contexts overlap, so the tokens are stored once: those that some context covers, in their order, and an
example is a place among them. Activations are stored in 255 steps of the latent's largest, values in 65535.
"""

from __future__ import annotations

import base64
import gzip
from typing import Any

import numpy as np
import torch

from saelens_matryoshka.report.decoder import DecoderRelations
from saelens_matryoshka.report.logits import LogitEffects
from saelens_matryoshka.report.samples import Samples
from saelens_matryoshka.report.text import TokenText

_NONE = 0xFFFFFFFF
_BINS = 32
# Strongest examples that are shown of each latent. Of each interval it is one.
_N_TOP = 8


def pack_latents(
    samples: Samples,
    text: TokenText,
    widths: list[int],
    relations: DecoderRelations,
    logits: LogitEffects | None,
    *,
    no_logits: str,
) -> tuple[dict[str, Any], str]:
    """What the page's script needs of every latent.

    Args:
        samples: Of all latents.
        text: Of the tokens.
        widths: Cumulative widths of the levels.
        relations: Between the decoder's rows.
        logits: Top and bottom logits; None where there are none.
        no_logits: Then, why.

    Returns:
        What is plain, for JSON, and the block: gzip of the arrays, as base64.
    """
    examples, n_top = _chosen(samples)
    arrays: dict[str, np.ndarray] = {}
    stream = _add_examples(arrays, samples, *examples)
    used = [stream] if logits is None else [stream, _array(logits.top_tokens), _array(logits.bottom_tokens)]
    vocabulary, index = np.unique(np.concatenate([tokens.ravel() for tokens in used]), return_inverse=True)
    small = np.uint16 if len(vocabulary) <= 1 << 16 else np.uint32
    stream_index, *logit_index = np.split(index.ravel(), np.cumsum([tokens.size for tokens in used])[:-1])
    arrays["stream"] = stream_index.astype(small)
    scale = 1.0
    if logits is not None:
        arrays["topToken"], arrays["bottomToken"] = (tokens.astype(small) for tokens in logit_index)
        values = [_array(logits.top_values), _array(logits.bottom_values)]
        scale = max(float(np.abs(value).max()) for value in values) or 1.0
        arrays["topValue"], arrays["bottomValue"] = (
            np.round(value / scale * 32767).astype(np.int16) for value in values
        )
    _add_statistics(arrays, samples)
    arrays["nearest"] = _array(relations.nearest).astype(np.uint32)
    arrays["nearestCosine"] = np.round(_array(relations.nearest_cosine) * 100).astype(np.int8)
    arrays["parent"] = _array(relations.parent).astype(np.int32)
    arrays["parentCosine"] = np.round(_array(relations.parent_cosine) * 10000).astype(np.int16)
    layout, block = _pack(arrays)
    plain = {
        "layout": layout,
        "d_sae": samples.d_sae,
        "widths": widths,
        "n_tokens": samples.n_tokens,
        "n_top": n_top,
        "n_intervals": examples[0].shape[1] - n_top,
        "window": examples[2].shape[2],
        "n_bins": _BINS,
        "n_logits": 0 if logits is None else logits.top_tokens.shape[1],
        "no_logits": no_logits,
        "logit_scale": scale,
        "n_nearest": relations.nearest.shape[1],
        "vocabulary": [_vocabulary_entry(text.bytes_of(int(token))) for token in vocabulary],
    }
    return plain, block


def _vocabulary_entry(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)  # part of a character


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _chosen(samples: Samples) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int]:
    """Positions, values, windows `[d_sae, n, ...]`: the strongest, then one of each interval."""
    top, drawn = samples.top, samples.intervals
    n_top = min(_N_TOP, top.positions.shape[1])
    per_interval = drawn.positions.shape[1] // samples.n_intervals
    middle = torch.arange(samples.n_intervals - 1, -1, -1) * per_interval
    parts = ((top.positions, drawn.positions), (top.values, drawn.values), (top.windows, drawn.windows))
    positions, values, windows = (_array(torch.cat([a[:, :n_top], b[:, middle]], dim=1)) for a, b in parts)
    return (positions, values, windows), n_top


def _add_examples(
    arrays: dict[str, np.ndarray],
    samples: Samples,
    positions: np.ndarray,
    values: np.ndarray,
    windows: np.ndarray,
) -> np.ndarray:
    """Add the examples' arrays, and return the tokens they are places among."""
    context, before, after = samples.tokens.shape[1], samples.before, samples.after
    there, column = positions >= 0, positions % context
    start = positions - np.minimum(column, before)
    stop = positions + np.minimum(context - 1 - column, after) + 1
    edges = np.zeros(samples.tokens.numel() + 1, dtype=np.int64)
    np.add.at(edges, start[there], 1)
    np.add.at(edges, stop[there], -1)
    covered = edges.cumsum()[:-1] > 0
    place = covered.cumsum() - 1
    arrays["exampleStart"] = np.where(there, place[np.where(there, start, 0)], _NONE).astype(np.uint32)
    arrays["exampleLength"] = np.where(there, stop - start, 0).astype(np.uint16)
    arrays["examplePeak"] = np.where(there, positions - start, 0).astype(np.uint16)
    largest = np.maximum(_array(samples.largest), 1e-30)[:, None]
    arrays["exampleValue"] = np.round(np.clip(values / largest, 0, 1) * 65535).astype(np.uint16)
    # The window's first columns lie before the prompt where it starts inside it: moved to begin at the start.
    shift = np.where(there, before - (positions - start), 0)
    index = np.minimum(np.arange(windows.shape[2]) + shift[..., None], windows.shape[2] - 1)
    moved = np.take_along_axis(windows, index, axis=2)
    moved *= np.arange(windows.shape[2]) < (stop - start)[..., None]
    moved *= there[..., None]
    arrays["exampleActs"] = np.ceil(np.clip(moved / largest[..., None], 0, 1) * 255).astype(np.uint8)
    return samples.tokens.numpy().ravel()[covered]


def _add_statistics(arrays: dict[str, np.ndarray], samples: Samples) -> None:
    fired = _array(samples.fired)
    arrays["fired"] = fired.astype(np.uint32)
    arrays["largest"] = _array(samples.largest).astype(np.float32)
    arrays["scale"] = _array(samples.scale).astype(np.float32)
    arrays["mean"] = (_array(samples.sums) / np.maximum(fired, 1)).astype(np.float32)
    counts = np.sqrt(_array(samples.histogram).reshape(samples.d_sae, _BINS, -1).sum(axis=2))
    highest = np.maximum(counts.max(axis=1, keepdims=True), 1)
    arrays["histogram"] = np.ceil(counts / highest * 255).astype(np.uint8)


def _pack(arrays: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], str]:
    layout, parts, offset = [], [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        kind = f"{array.dtype.kind}{8 * array.dtype.itemsize}"  # such as u16, as the script calls it
        layout.append({"name": name, "type": kind, "offset": offset, "length": array.size})
        padding = -len(data) % 4  # typed arrays start at multiples of their size
        parts += [data, b"\0" * padding]
        offset += len(data) + padding
    return layout, base64.b64encode(gzip.compress(b"".join(parts), 6, mtime=0)).decode()
