"""Local texts in place of the datasets that SAEBench downloads.

Two kinds: running text (for `core`), and labelled text (for `sparse_probing`, `scr` and `tpp`): rows of
`text`, `label` and, for `scr`, `attribute`, in a train and a test split.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, DatasetDict, load_dataset

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "test"]
_TEXT_SUFFIXES = {".txt", ".md", ".py"}
_TABLE_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_FORMAT = (
    "a DatasetDict, or a folder with train and test files (.jsonl, .csv or .parquet), of rows with `text`, "
    "`label` and, for scr, `attribute`"
)


@dataclass(frozen=True)
class LabelledText:
    """Texts with a label each, and an attribute that has nothing to do with it."""

    train: Dataset
    """rows of `text`, `label` and, for scr, `attribute`"""
    test: Dataset
    """the same, of other texts"""
    name: str = "local"
    """what SAEBench calls it"""

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            missing = {"text", "label"} - set(getattr(self, split).column_names)
            if missing:
                raise ValueError(
                    f"labelled: the {split} split has no column {', '.join(sorted(missing))}; expected "
                    f"{_FORMAT}."
                )
        if len(self.labels) < 2:
            raise ValueError(
                f"labelled: the labels that train and test share are {self.labels}; probing needs two."
            )

    @classmethod
    def load(cls, source: LabelledText | DatasetDict | str | Path) -> LabelledText:
        """From a DatasetDict or a folder.

        Args:
            source: A DatasetDict, or a folder with train and test files (.jsonl, .csv or .parquet), of
                rows with `text`, `label` and, for scr, `attribute`.

        Raises:
            ValueError: There is no such folder, or a split or a column is missing.
        """
        if isinstance(source, LabelledText):
            return source
        if not isinstance(source, DatasetDict):
            source = _read_splits(Path(source))
        missing = {"train", "test"} - set(source)
        if missing:
            raise ValueError(
                f"labelled: no split {' and '.join(sorted(missing))} in {sorted(source)}; expected {_FORMAT}."
            )
        return cls(source["train"], source["test"])

    @property
    def labels(self) -> list[str]:
        """The labels that occur in both splits."""
        return self._values("label")

    @property
    def attributes(self) -> list[str]:
        """The attributes that occur in both splits; empty without the column."""
        return self._values("attribute") if "attribute" in self.train.column_names else []

    def fingerprint(self) -> str:
        """Hash of all rows."""
        digest = hashlib.sha256()
        for dataset in (self.train, self.test):
            for row in dataset:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def frame(self, split: Split, seed: int) -> pd.DataFrame:
        """The rows, shuffled; labels and attributes as text."""
        frame: Any = getattr(self, split).to_pandas()
        for name in {"label", "attribute"} & set(frame.columns):
            frame[name] = frame[name].astype(str)
        return frame.sample(frac=1.0, random_state=seed)

    def classes(
        self, n_train: int, n_test: int, seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Texts by label, the same number of each: those of train, those of test."""
        train, test = self.frame("train", seed), self.frame("test", seed)
        return (
            {label: train[train.label == label].text.tolist()[:n_train] for label in self.labels},
            {label: test[test.label == label].text.tolist()[:n_test] for label in self.labels},
        )

    def class_size(self, split: Split) -> int:
        """Texts of the rarest label."""
        counts = self.frame(split, 0).label.value_counts()
        return int(min(counts[label] for label in self.labels))

    def label_pairs(self) -> list[tuple[str, str]]:
        """Neighbouring labels, two by two, for scr."""
        labels = self.labels
        return [(labels[i], labels[i + 1]) for i in range(0, len(labels) - 1, 2)]

    def quadrant_size(self, split: Split) -> int:
        """Texts that every label has of each of the first two attributes, as scr needs them.

        SAEBench takes n of each of the four combinations of two labels and two attributes, and more than
        2n of the two where label and attribute go together.
        """
        frame = self.frame(split, 0)
        counts = Counter(zip(frame.label, frame.attribute, strict=True))
        first, second = self.attributes[:2]
        return min(
            min(
                (min(counts[a, first], counts[b, second]) - 1) // 2,
                min(counts[a, second], counts[b, first]),
            )
            for a, b in self.label_pairs()
        )

    def _values(self, column: str) -> list[str]:
        shared = set(map(str, self.train[column])) & set(map(str, self.test[column]))
        return sorted(shared)


def running_text(source: Dataset | str | Path, folder: Path) -> str:
    """What `datasets.load_dataset` takes for the running text.

    Args:
        source: A dataset with a column `text`; a local file or folder (.txt, .md and .py files are a
            document each, .jsonl, .csv and .parquet have a column `text`); or a dataset's name on the hub,
            which is passed on.
        folder: Where local text is written as one .jsonl file.

    Raises:
        ValueError: The local folder holds no such file.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            if isinstance(source, Path) or source.startswith((".", "/", "~")):
                raise ValueError(f"text={str(source)!r}: there is no such file or folder.")
            return source
        source = _read_text(path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in source:
            file.write(json.dumps({"text": row["text"]}) + "\n")  # type: ignore[index]
    return str(folder)


def _read_text(path: Path) -> Dataset:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    documents = [file for file in files if file.suffix in _TEXT_SUFFIXES]
    tables = [file for file in files if file.suffix in _TABLE_SUFFIXES]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in documents]
    for file in tables:
        table = load_dataset(_TABLE_SUFFIXES[file.suffix], data_files=glob.escape(str(file)), split="train")
        if "text" not in table.column_names:  # type: ignore[union-attr]
            raise ValueError(f"text={str(path)!r}: {file.name} has no column `text`.")
        texts += table["text"]  # type: ignore[index]
    if not texts:
        known = ", ".join(sorted(_TEXT_SUFFIXES | set(_TABLE_SUFFIXES)))
        raise ValueError(f"text={str(path)!r}: there is no file with text ({known}).")
    return Dataset.from_dict({"text": texts})


def _read_splits(folder: Path) -> DatasetDict:
    if not folder.is_dir():
        raise ValueError(f"labelled={str(folder)!r} is no folder; expected {_FORMAT}.")
    splits = {}
    for split in ("train", "test"):
        for suffix, kind in _TABLE_SUFFIXES.items():
            if (path := folder / f"{split}{suffix}").exists():
                splits[split] = load_dataset(kind, data_files=glob.escape(str(path)), split="train")
    return DatasetDict(splits)
