"""What the commands take: language models, SAEs and text, by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens import SAE

TINY = "tiny"


def pick_device(device: str | None) -> str:
    """The device asked for, else cuda if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
        if torch.device(device).type != "meta":
            return device
    except (RuntimeError, AssertionError):
        pass
    raise ValueError(f"--device {device!r} is not one that this machine has. Try cpu, or leave it out.")


def is_tiny(model_name: str | None) -> bool:
    """Whether the name is that of the embedded model."""
    from saelens_matryoshka import tiny

    return model_name in tiny.NAMES


def load_language_model(
    name: str,
    device: str,
    *,
    model_class_name: str = "HookedTransformer",
    from_pretrained_kwargs: dict[str, Any] | None = None,
) -> Any:
    """The embedded model for "tiny", else what SAELens loads under that name."""
    if is_tiny(name):
        from saelens_matryoshka.tiny import load_hooked_transformer

        return load_hooked_transformer().to(device, print_details=False)
    from sae_lens.load_model import load_model

    from saelens_matryoshka.runs.language_models import naming_similar_models

    with naming_similar_models(name, f"model {name!r}"):
        return load_model(model_class_name, name, device, from_pretrained_kwargs)


def load_language_model_for(sae: SAE[Any], name: str | None, device: str, *, dtype: str | None = None) -> Any:
    """The language model an SAE was trained on, loaded as then; `name` and `dtype` take their places.

    Raises:
        ValueError: no name is given and the SAE's metadata have none.
    """
    metadata = sae.cfg.metadata
    name = metadata.model_name if name is None else name
    if not name:
        raise ValueError("--model is needed: this model's metadata do not say which language model it reads.")
    return load_language_model(
        name,
        device,
        model_class_name=metadata.model_class_name or "HookedTransformer",
        from_pretrained_kwargs={
            **(metadata.model_from_pretrained_kwargs or {}),
            **({} if dtype is None else {"dtype": dtype}),
        },
    )


def load_sae(where: str, device: str) -> SAE[Any]:
    """An SAE or transcoder from a folder, or RELEASE:SAE_ID from the hub as SAELens knows it.

    Raises:
        ValueError: there is no such folder, or it holds no model.
    """
    from sae_lens import SAE

    folder = Path(where).expanduser()
    if where and folder.is_dir():
        from saelens_matryoshka.formats.saelens import open_folder

        return open_folder(folder, device)
    release, sae_id = _require_release(where)
    return SAE.from_pretrained(release, sae_id, device=device)


def _require_release(where: str) -> tuple[str, str]:
    """The two parts of RELEASE:SAE_ID."""
    release, colon, sae_id = where.partition(":")
    if not colon or not sae_id or Path(where).exists():
        raise ValueError(
            f"{where!r} is no folder{_similar_folder(where)} Give a folder saved by SAELens, or "
            "RELEASE:SAE_ID for one of its releases or a repository of the hub."
        )
    return release, sae_id


def _similar_folder(where: str) -> str:
    """The folder that may have been meant, as the end of a sentence."""
    from saelens_matryoshka.runs.fields import did_you_mean

    path = Path(where).expanduser()
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return did_you_mean(where, [str(one) for one in beside if one.is_dir()])


def results_folder(where: str, out: Path | None, name: str) -> Path:
    """`out`, else `name` beside the weights.

    Raises:
        ValueError: the model is not in a folder, and there is no `out`; or it is nowhere.
    """
    if out is not None:
        return out
    if not Path(where).is_dir():
        _require_release(where)
        raise ValueError("--out is needed: the model is not in a folder that could take the results.")
    return Path(where) / name


def named_folder(where: str) -> Path:
    """The folder of a name.

    Raises:
        ValueError: the name is empty, as that of a variable that is not set: `Path` would take it for the
            current folder.
    """
    if not where:
        raise ValueError("'' is no folder. Give its name, or . for the current one.")
    return Path(where)


def folder_name(where: str) -> str:
    """What a folder is called, also where it is named as "." or "..", or the end of RELEASE:SAE_ID."""
    return Path(os.path.abspath(where)).name


def load_saes(places: list[str], device: str) -> dict[str, SAE[Any]]:
    """Several, each under the shortest name that tells it from the others."""
    if len({Path(place).resolve() for place in places}) < len(places):
        raise ValueError(f"The same model is given twice: {', '.join(places)}.")
    names = [folder_name(place) for place in places]
    if len(set(names)) < len(names):
        names = places
    return {name: load_sae(place, device) for name, place in zip(names, places, strict=True)}


def load_text(
    sae: SAE[Any], dataset: str | None, split: str = "train", skip: int = 0, *, model: str | None = None
) -> tuple[Any, str]:
    """Text to evaluate on, streamed, and in words what it is.

    Args:
        sae: An SAE; without `dataset`, the data it was trained on, or for the embedded model its held-out
            files.
        dataset: A dataset of the hub, a folder, or a .txt, .jsonl, .parquet or .csv file.
        split: Its split.
        skip: Documents to leave out at its start.
        model: Name of the language model, where it is not the one in the SAE's metadata.
    """
    metadata = sae.cfg.metadata
    skipped = f", from document {skip:,} on" if skip else ""
    if dataset is None and is_tiny(model or metadata.model_name):
        from saelens_matryoshka.tiny import text

        return _after(text.dataset("held_out"), skip), f"held-out standard library files{skipped}"
    name = metadata.dataset_path if dataset is None else dataset
    if not name:
        raise ValueError("--dataset is needed: this model's metadata do not say what it was trained on.")
    described = f"{name}, split {split}{skipped}"
    if dataset is None:
        described += " (its training data: give --dataset or --skip for text it has not seen)"
    return _after(open_dataset(name, split), skip), described


def _after(documents: Any, skip: int) -> Any:
    if hasattr(documents, "__len__") and skip >= len(documents):
        raise ValueError(f"--skip {skip} leaves nothing of a text of {len(documents)} documents.")
    return documents.skip(skip) if skip else documents


def open_dataset(name: str, split: str) -> Any:
    """The documents of a dataset, see `open_text`; what is wrong with it is said of --dataset."""
    from saelens_matryoshka.files.text import TextError, open_text

    try:
        return open_text(name, split)
    except TextError as error:
        raise ValueError(f"--dataset {error}") from None
