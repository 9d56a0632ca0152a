"""Checkpoints of bartbussmann/matryoshka_sae and of the transcoder repositories that grew out of it.

A `.pt` file of `W_enc [d_in, F], b_enc, W_dec [F, d_out], b_dec, threshold` (a scalar), and the run's
`config.json` beside it or in the folder above. Some name a TopK SAE's k in the config and have no threshold.

- An SAE subtracts b_dec from its input (`hook_point`); a transcoder does not (`source_hook_point`,
  `target_hook_point`).
- `input_unit_norm` (their default) centres each token's input and divides it by its standard deviation; the
  output is scaled back by the *source's* mean and deviation, a transcoder's too. SAELens's `layer_norm` is
  the same function, so the model is what it was; other formats have no place for it.
- `group_sizes` and `prefix_sizes` are what each level adds; a checkpoint may have fewer latents than its
  `dict_size` says.
"""

from __future__ import annotations

import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from saelens_matryoshka.files.names import natural
from saelens_matryoshka.formats.coder import SparseCoder, StateDict
from saelens_matryoshka.formats.files import FormatError, read_json, read_pickle, require_k
from saelens_matryoshka.formats.layout import join
from saelens_matryoshka.formats.sources import Source
from saelens_matryoshka.widths import cumulative_widths

CONFIG = "config.json"
_SHAPES = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "threshold": (),
}
# Of a run's folder the first of these is read; without any, the checkpoint with the highest number.
_PREFERRED = ("final.pt", "checkpoints/final.pt", "sae.pt", "best_model.pt")


def items(source: Source, inside: str = "") -> list[str]:
    """The runs' folders: those with a config, and a checkpoint in them or in `checkpoints/`."""
    names = source.names(inside)
    if names == [inside] and inside.endswith(".pt"):
        return names  # one file was meant
    configs = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == CONFIG}
    runs = {PurePosixPath(name).parent for name in names if name.endswith(".pt")}
    runs = {str(run.parent if run.name == "checkpoints" else run) for run in runs}
    return sorted(runs & configs, key=natural)


def load(source: Source, item: str) -> SparseCoder:
    """Read one checkpoint.

    Args:
        source: Where the run is.
        item: The `.pt` file, or the run's folder, of which the final checkpoint is read.

    Raises:
        FormatError: there is no config or checkpoint, or they are not what the format says.
    """
    path, folder = _checkpoint(source, item)
    config_path = source.find(join(str(folder), CONFIG)) or source.find(join(str(folder.parent), CONFIG))
    if config_path is None:
        raise FormatError(f"{path}: there is no {CONFIG} beside it or above, so its hook is unknown.")
    return from_state(read_json(config_path), read_pickle(path, _SHAPES, ("threshold",)), str(config_path))


def _checkpoint(source: Source, item: str) -> tuple[Path, PurePosixPath]:
    if item.endswith(".pt"):
        return source.file(item), PurePosixPath(item).parent
    found = [path for name in _PREFERRED if (path := source.find(join(item, name)))]
    if not found:
        steps = [name for name in source.names(item) if name.endswith(".pt")]
        found = [source.file(max(steps, key=natural))] if steps else []
    if not found:
        raise FormatError(f"{source.label}/{item}: there is no .pt file in it.")
    return found[0], PurePosixPath(item)


def from_state(config: dict[str, Any], tensors: StateDict, label: str = CONFIG) -> SparseCoder:
    """The coder of a run's config and a checkpoint.

    Raises:
        FormatError: the config contradicts the tensors.
    """
    source, target = config.get("source_hook_point"), config.get("target_hook_point")
    transcoder = isinstance(source, str) and isinstance(target, str)
    hook = source if transcoder else config.get("hook_point")
    coder = SparseCoder(
        W_enc=tensors["W_enc"].float(),
        b_enc=tensors["b_enc"].float(),
        W_dec=tensors["W_dec"].float(),
        b_dec=tensors["b_dec"].float(),
        subtract_b_dec=not transcoder,
        layer_norm=config.get("input_unit_norm", False) is True,
        metadata={"converted_from": "matryoshka checkpoint"},
    )
    if not transcoder and coder.d_in != coder.d_out:
        raise FormatError(f"{label}: names one hook, but the checkpoint maps {coder.d_in} to {coder.d_out}.")
    names = {"hook_name": hook, "hook_name_out": target if transcoder else None}
    names |= {"model_name": config.get("model_name"), "dataset_path": config.get("dataset_path")}
    coder = coder.with_metadata(
        **{name: value for name, value in names.items() if isinstance(value, str)},
        context_size=config["seq_len"] if isinstance(config.get("seq_len"), int) else None,
        matryoshka_widths=_widths(config, coder.d_sae, label),
    )
    if config.get("dict_size") not in (None, coder.d_sae):
        warnings.warn(
            f"{label}: dict_size={config['dict_size']!r}, but the checkpoint has {coder.d_sae} latents.",
            stacklevel=2,
        )
    return _with_activation(coder, config, tensors, label)


def _with_activation(
    coder: SparseCoder, config: dict[str, Any], tensors: StateDict, label: str
) -> SparseCoder:
    kind = str(config.get("sae_type", ""))
    if kind == "topk":
        return coder.with_tensors(k=require_k(config.get("top_k"), coder.d_sae, f"{label}: top_k"))
    if kind == "jumprelu":
        raise FormatError(f"{label}: sae_type='jumprelu' keeps logarithms of thresholds; it cannot be read.")
    if "threshold" in tensors:
        return coder.with_tensors(threshold=tensors["threshold"].float().expand(coder.d_sae).contiguous())
    if kind in ("vanilla", ""):
        return coder
    raise FormatError(f"{label}: sae_type={kind!r} selects by a threshold, and the checkpoint has none.")


def _widths(config: dict[str, Any], d_sae: int, label: str) -> list[int] | None:
    sizes = config.get("prefix_sizes") or config.get("group_sizes")
    if sizes is None:
        return None
    if not isinstance(sizes, list):
        raise FormatError(f"{label}: group_sizes={sizes!r} must be a list.")
    try:
        return cumulative_widths(sizes, d_sae)
    except ValueError as error:
        raise FormatError(f"{label}: {error}") from None
