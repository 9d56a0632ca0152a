"""Folders of one kind into folders of another: what the commands `import` and `export` do.

Both read everything, check everything, write beside the target folder and rename it when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelens_matryoshka.formats.card import write_card
from saelens_matryoshka.formats.coder import SparseCoder, build, from_saelens
from saelens_matryoshka.formats.files import FormatError, new_folder, require_new
from saelens_matryoshka.formats.layout import block_hook
from saelens_matryoshka.formats.registry import FORMATS, Given, get_format, load
from saelens_matryoshka.formats.sources import Folder, open_source
from saelens_matryoshka.prefixes import truncate

EVALUATION = "evaluation.json"
Change = Callable[[SparseCoder], SparseCoder]
"""What to do with each model on the way, e.g. fit thresholds"""


@dataclass(frozen=True)
class Model:
    """One model on its way from one folder to another."""

    coder: SparseCoder
    name: str
    """of its folder in a set, such as "layer_3" """
    evaluation: dict[str, Any] | None = None
    """its `evaluation.json`, if there is one"""


# ---- in


def read_models(src: str, format: str, *, item: str | None = None, given: Given | None = None) -> list[Model]:
    """Everything that a source holds in a format.

    Args:
        src: A path, a hub repository or a W&B artifact, see `open_source`.
        format: One of `FORMATS`.
        item: Only this one, a path in the source.
        given: What the files do not say.

    Raises:
        FormatError: there is nothing, or it is not what its format says.
    """
    source, inside = open_source(src)
    inside = "/".join(part for part in (inside, item) if part)
    # One item that the format knows how to name (a layer without its suffix) need not be listed.
    found = [inside] if item else get_format(format).items(source, inside)
    if not found:
        others = [name for name, other in FORMATS.items() if other.items(source, inside)]
        hint = f" It looks like {' or '.join(others)}." if others else ""
        raise FormatError(f"{src} holds nothing in the format {format!r}.{hint}")
    coders = [load(source, name, format, given) for name in found]
    names = _names(coders)
    return [Model(coder, name) for coder, name in zip(coders, names, strict=True)]


def _names(coders: Sequence[SparseCoder]) -> list[str]:
    """Folder names, by layer where that tells the models apart, otherwise by hook."""
    hooks = [str(coder.metadata.get("hook_name")) for coder in coders]
    blocks = [block_hook(hook) for hook in hooks]
    names = [f"layer_{block[0]}" if block else hook for block, hook in zip(blocks, hooks, strict=True)]
    if len(set(names)) < len(names):
        names = hooks
    if len(set(names)) < len(names):
        names = [f"{hook}_{index}" for index, hook in enumerate(hooks)]
    return [name.replace("/", "_").lstrip(".") for name in names]


def import_models(
    src: str,
    format: str,
    out: Path,
    *,
    item: str | None = None,
    given: Given | None = None,
    change: Change | None = None,
) -> list[Model]:
    """Write what a source holds as stock SAELens folders: `out` itself for one, `out/layer_N` for several.

    Raises:
        FormatError: see `read_models`, or SAELens has no class for it.
        FileExistsError: `out` is not empty.
    """
    require_new(out)
    models = [_changed(model, change) for model in read_models(src, format, item=item, given=given)]
    with new_folder(out) as folder:
        _save_saelens(models, folder)
    return models


# ---- out


def read_stock(path: Path) -> list[Model]:
    """The stock model of a folder, or those of its sub-folders, with their evaluations.

    Raises:
        FormatError: there is none, or no other format has such a model.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder: name that of a SAELens model, or one that holds some.")
    source = Folder(path.parent, label=str(path.parent))
    items = FORMATS["saelens"].items(source, path.name)
    direct = [item for item in items if item.count("/") <= 1]
    if not direct:
        raise FormatError(
            f"{path} holds no SAELens model (cfg.json and sae_weights.safetensors), nor do the folders in it."
        )
    if path.name in direct:
        direct = [path.name]
    models = []
    for item in direct:
        coder = load(source, item, "saelens")
        evaluation = path.parent / item / EVALUATION
        result = json.loads(evaluation.read_text()) if evaluation.is_file() else None
        models.append(Model(coder, item.rpartition("/")[2], result))
    return models


def export_models(
    path: Path,
    format: str,
    out: Path,
    *,
    widths: Sequence[int] = (),
    change: Change | None = None,
    repo_id: str | None = None,
) -> list[Path]:
    """Write the stock models of a folder in another tool's format.

    Args:
        path: Folder of a stock model, or of several, one per layer.
        format: The other tool's; "saelens" writes stock folders again, e.g. of a prefix.
        out: A new folder.
        widths: Prefixes to write, each as a set of its own (in `out/width_W` if there are several). None: the
            whole models.
        change: What to do with each model first.
        repo_id: Where it will be uploaded to, for the model card.

    Returns:
        The folders written, one per prefix.

    Raises:
        FormatError: the format cannot carry a model, or a prefix is wider than a model.
        FileExistsError: `out` is not empty.
    """
    require_new(out)
    save = get_format(format).save
    if save is None and format != "saelens":
        writable = ["saelens", *(name for name, other in FORMATS.items() if other.save)]
        raise FormatError(f"{format!r} is only read; {', '.join(writable)} can be written.")
    models = [_changed(model, change) for model in read_stock(path)]
    narrowed = [[_prefix(model, width) for model in models] for width in widths] or [models]
    names = [f"width_{width}" for width in widths] if len(widths) > 1 else [""]
    sets = list(zip(names, narrowed, strict=True))
    with new_folder(out) as partial:
        for name, part in sets:
            folder = partial / name
            folder.mkdir(exist_ok=True)
            if save is None:
                # the hub's SAELens repositories keep every model in a folder of its own
                _save_saelens(part, folder, named=repo_id is not None)
            else:
                save([model.coder for model in part], folder)
        write_card(partial, format, sets, repo_id)
    return [out / name for name in names]


def _changed(model: Model, change: Change | None) -> Model:
    return model if change is None else Model(change(model.coder), model.name, None)


def _prefix(model: Model, width: int) -> Model:
    coder = from_saelens(truncate(build(model.coder), width))
    evaluation = model.evaluation
    if evaluation is not None:
        rows = [row for row in evaluation.get("prefixes", []) if row.get("width", 0) <= width]
        evaluation = {**evaluation, "prefixes": rows}
    return Model(coder, model.name, evaluation)


def _save_saelens(models: Sequence[Model], out: Path, *, named: bool = False) -> None:
    for model in models:
        folder = out / model.name if named or len(models) > 1 else out
        build(model.coder).save_model(folder)
        if model.evaluation is not None:
            (folder / EVALUATION).write_text(json.dumps(model.evaluation, indent=2))


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository of the hub, in one commit; the repository is made if need be.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name} with saelens-matryoshka"
    )
    return str(commit.commit_url)
