"""Folders of one kind into folders of another: what the commands `import` and `export` do.

Both read everything, check everything, write beside the target folder and rename it when it is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from saelens_matryoshka.files.atomic import obstacle, whole_folder
from saelens_matryoshka.files.names import unreserved
from saelens_matryoshka.formats.card import write_card
from saelens_matryoshka.formats.coder import SparseCoder, build, from_saelens
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.formats.layout import Writer
from saelens_matryoshka.formats.registry import FORMATS, Unstated, get_format, load
from saelens_matryoshka.formats.sources import Folder, Source, open_source
from saelens_matryoshka.formats.thresholds import keep_topk
from saelens_matryoshka.prefixes import truncate
from saelens_matryoshka.runs.recorded import read_evaluation
from saelens_matryoshka.sites import block_hook

EVALUATION = "evaluation.json"
_SHOWN_IDS = 10
Change = Callable[[SparseCoder], SparseCoder]
"""What to do with each model on the way, e.g. fit thresholds"""


@dataclass(frozen=True)
class Model:
    """What is to be said of one model that was written."""

    coder: SparseCoder
    """without its weights"""
    name: str
    """of its folder in a set, such as "layer_3" """
    evaluation: dict[str, Any] | None = None
    """of its prefixes, if there is one"""


# ---- in


def import_models(
    src: str,
    format: str,
    out: Path | str,
    *,
    item: str | None = None,
    given: Unstated | None = None,
    change: Change | None = None,
) -> list[Model]:
    """Write what a source holds as stock SAELens folders: `out` itself for one, `out/layer_N` for several.

    Args:
        src: A path, a hub repository or a W&B artifact, see `open_source`.
        format: One of `FORMATS`.
        out: A new folder.
        item: Only this, a path in the source.
        given: What the files do not say.
        change: What to do with each model on the way.

    Returns:
        What was written.

    Raises:
        FormatError: there is nothing, it is not what its format says, or SAELens has no class for it.
        FileExistsError: `out` is not empty.
    """
    out = Path(out)
    _require_new(out)
    if item == "":  # as that of a variable that is not set
        raise FormatError("--id '' names nothing: leave it out for all that the source holds.")
    source, inside = open_source(src)
    whole, inside = inside, "/".join(part for part in (inside, item) if part)
    found = get_format(format).items(source, inside)
    # Perhaps a name that the format understands, such as a layer's without its suffix.
    is_guess = not found and bool(item) and source.names(inside) != [inside]
    if is_guess:
        found = [inside]
    if not found:
        where = "/".join(part for part in (src, item) if part)
        raise FormatError(f"{where} holds nothing in the format {format!r}.{_hint(source, inside, format)}")

    def import_one(name: str, folder: Path) -> SparseCoder:
        try:
            coder = load(source, name, format, given)
        except FormatError as error:
            if not is_guess:
                raise
            raise FormatError(f"{error}{_ids(source, whole, format)}") from None
        coder = coder if change is None else change(coder)
        build(coder).save_model(folder)
        return coder.without_weights()

    with whole_folder(out) as folder:
        # One at a time: a set of large models need not fit into memory.
        places = [folder] if len(found) == 1 else [folder / str(index) for index in range(len(found))]
        coders = [import_one(name, place) for name, place in zip(found, places, strict=True)]
        names = _names(coders)
        if len(found) > 1:
            for index, name in enumerate(names):
                (folder / str(index)).rename(folder / name)
    return [Model(coder, name) for coder, name in zip(coders, names, strict=True)]


def _hint(source: Source, inside: str, format: str) -> str:
    """What may have been meant: the folder of a file, or another format that the source does hold."""
    above = PurePosixPath(inside).parent
    if source.names(inside) == [inside] and str(above) in get_format(format).items(source, str(above)):
        return " It is one of the files of a model: name the folder that they are in."
    others = [name for name, other in FORMATS.items() if other.items(source, inside)]
    return f" It looks like {' or '.join(others)}." if others else ""


def _ids(source: Source, inside: str, format: str) -> str:
    """What could have been asked for by name in a source."""
    ids = [name.removeprefix(f"{inside}/") for name in get_format(format).items(source, inside)]
    more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
    return f" The ids there are {', '.join(ids[:_SHOWN_IDS])}{more}." if ids and ids != [inside] else ""


def _names(coders: Sequence[SparseCoder]) -> list[str]:
    """Folder names, by layer where that tells the models apart, otherwise by hook."""
    hooks = [str(coder.metadata.get("hook_name")) for coder in coders]
    blocks = [block_hook(hook) for hook in hooks]
    names = [f"layer_{block[0]}" if block else _fit(hook) for block, hook in zip(blocks, hooks, strict=True)]
    if len(set(names)) < len(names):
        names = [_fit(hook) for hook in hooks]
    if len(set(names)) < len(names):
        names = [f"{_fit(hook)}_{index}" for index, hook in enumerate(hooks)]
    return names


def _fit(hook: str) -> str:
    """A hook's name as that of a folder, on any system."""
    return unreserved(re.sub(r"[^\w.-]", "_", hook).strip(".") or "model")


# ---- out


def stock_models(path: Path) -> list[Path]:
    """The folder itself if it holds a stock model, otherwise those of its folders that do.

    Raises:
        FormatError: there is none.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder: name that of a SAELens model, or one that holds some.")
    items = FORMATS["saelens"].items(Folder(path.parent), path.name)
    if path.name in items:
        return [path]
    folders = [path.parent / item for item in items if item.count("/") == 1]
    if not folders:
        raise FormatError(
            f"{path} holds no SAELens model (cfg.json and sae_weights.safetensors), nor do the folders in it."
        )
    return folders


def export_models(
    path: Path | str,
    format: str,
    out: Path | str,
    *,
    widths: Sequence[int] = (),
    change: Change | None = None,
    topk: int | None = None,
    repo_id: str | None = None,
) -> list[Path]:
    """Write the stock models of a folder in another tool's format.

    Args:
        path: Folder of a stock model, or of several, one per layer.
        format: The other tool's; "saelens" writes stock folders again, e.g. of a prefix.
        out: A new folder.
        widths: Prefixes to write, each as a set of its own (in `out/width_W` if there are several). Empty:
            the whole models.
        change: What to do with each whole model first.
        topk: Keep that many latents of every token, in place of the thresholds.
        repo_id: Where it will be uploaded to, for the model card.

    Returns:
        The folders written, one per prefix.

    Raises:
        FormatError: the format cannot carry a model, or a prefix is wider than a model.
        ValueError: `widths` is no list.
        FileExistsError: `out` is not empty.
    """
    path, out = Path(path), Path(out)
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise ValueError(f"widths={widths!r} must be a list of widths, such as [256].")
    _require_new(out)
    make_writer = get_format(format).writer
    if make_writer is None:
        writable = [name for name, other in FORMATS.items() if other.writer]
        raise FormatError(f"{format!r} is only read; {', '.join(writable)} can be written.")
    if repo_id is not None:
        validate_repo_id(repo_id)  # before anything is written
    stock = stock_models(path)
    widths = list(dict.fromkeys(widths))
    names = {width: f"width_{width}" if len(widths) > 1 else "" for width in widths} or {None: ""}
    # The hub's SAELens repositories keep every model in a folder of its own.
    several = len(stock) > 1 or (format == "saelens" and repo_id is not None)
    sets: dict[str, list[Model]] = {name: [] for name in names.values()}

    def export_one(folder: Path) -> None:
        whole = load(Folder(folder.parent), folder.name, "saelens")
        whole = whole if change is None else change(whole)
        evaluation = _evaluation(folder) if change is None and topk is None else None
        for width, set_name in names.items():
            coder = whole if width is None else from_saelens(truncate(build(whole), width))
            coder = coder if topk is None else keep_topk(coder, topk)
            name = folder.name if len(stock) > 1 else _names([coder])[0]
            writers[width].add(coder, name)
            rows = _rows_up_to(evaluation, coder.d_sae)
            sets[set_name].append(Model(coder.without_weights(), name, rows))
            if format == "saelens" and rows:
                place = partial / set_name / name if several else partial / set_name
                (place / EVALUATION).write_text(json.dumps(rows, indent=2))

    with whole_folder(out) as partial:
        writers: dict[int | None, Writer] = {}
        for width, set_name in names.items():
            (partial / set_name).mkdir(exist_ok=True)
            writers[width] = make_writer(partial / set_name, several)
        # One at a time: a set of large models need not fit into memory.
        for folder in stock:
            export_one(folder)
        for writer in writers.values():
            writer.close()
        write_card(partial, format, list(sets.items()), repo_id, several=several)
    return [out / name for name in names.values()]


def _evaluation(folder: Path) -> dict[str, Any] | None:
    try:
        return read_evaluation(folder)
    except ValueError:  # of no use in a card, and no reason not to export the weights
        return None


def _rows_up_to(evaluation: dict[str, Any] | None, width: int) -> dict[str, Any] | None:
    """The evaluation of a prefix: that of the prefixes it has."""
    if evaluation is None:
        return None
    return {**evaluation, "prefixes": [row for row in evaluation["prefixes"] if row["width"] <= width]}


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository of the hub, in one commit; the repository is made if need be.

    Returns:
        The address of the commit.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name} with saelens-matryoshka"
    )
    return str(commit.commit_url)


# ---- both


def _require_new(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        OSError: `out` is a file, or a folder that is not empty; or it cannot be made.
    """
    if fault := obstacle(out):
        raise OSError(f"--out {out} cannot be made: {fault}.")
    if os.path.lexists(out) and not out.is_dir():
        raise FileExistsError(f"--out {out} exists and is no folder: name another one.")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty: name another folder, or move that one away.")
