from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from saelens_matryoshka.saebench.data import LabelledText, running_text
from saelens_matryoshka.saebench.embedded import standard_library
from tests.saebench.dictionaries import labelled_words


def test_labelled_text_is_read_from_files_as_from_memory(tmp_path: Path) -> None:
    rows = labelled_words(n_train=5, n_test=3)
    folder = tmp_path / "texts [1]*"  # which is no pattern
    folder.mkdir()
    for split, part in rows.items():
        part.to_json(folder / f"{split}.jsonl")
    read, given = LabelledText.load(folder), LabelledText.load(rows)
    assert read.fingerprint() == given.fingerprint()
    assert read.labels == ["import", "return", "self"]
    assert read.attributes == ["flush", "indented"]


def test_classes_are_balanced_and_reproducible() -> None:
    labelled = LabelledText.load(labelled_words(n_train=6, n_test=4))
    assert labelled.class_size("train") == 12
    train, test = labelled.classes(10, 8, seed=0)
    assert {len(texts) for texts in train.values()} == {10}
    assert {len(texts) for texts in test.values()} == {8}
    assert all(f" {label}" in text for label, texts in train.items() for text in texts)
    assert labelled.classes(10, 8, seed=0) == (train, test)
    assert labelled.classes(10, 8, seed=1) != (train, test)


def test_scr_takes_no_more_than_every_combination_has() -> None:
    labelled = LabelledText.load(labelled_words(n_train=9, n_test=5))
    assert labelled.label_pairs() == [("import", "return")]
    # more than twice as many where label and attribute go together
    assert labelled.quadrant_size("train") == 4
    assert labelled.quadrant_size("test") == 2


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (DatasetDict(train=Dataset.from_dict({"text": ["a"], "label": ["b"]})), "no split test"),
        ({"text": ["a", "b"]}, "no column label"),
        ({"text": ["a", "b"], "label": ["c", "c"]}, r"\['c'\]; probing needs two"),
    ],
)
def test_unusable_labelled_text_is_refused(rows: object, says: str) -> None:
    if isinstance(rows, dict) and not isinstance(rows, DatasetDict):
        dataset = Dataset.from_dict(rows)
        rows = DatasetDict(train=dataset, test=dataset)
    with pytest.raises(ValueError, match=says):
        LabelledText.load(rows)  # type: ignore[arg-type]


def test_a_local_folder_is_a_document_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("one\n\ntwo")
    (source / "b.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    (source / "c.bin").write_bytes(b"\0")
    path = running_text(source, tmp_path / "out")
    rows = [json.loads(line) for line in (Path(path) / "train.jsonl").read_text().splitlines()]
    assert rows == [{"text": "one\n\ntwo"}, {"text": "three"}]


def test_hub_names_are_passed_on_and_empty_folders_refused(tmp_path: Path) -> None:
    assert running_text("Skylion007/openwebtext", tmp_path / "out") == "Skylion007/openwebtext"
    with pytest.raises(ValueError, match="there is no file with text"):
        running_text(tmp_path, tmp_path / "out")


def test_standard_library_has_enough_of_every_combination() -> None:
    labelled = standard_library()
    assert labelled.attributes == ["code", "prose"]
    assert len(labelled.labels) == 5
    assert labelled.quadrant_size("train") >= 40
    assert labelled.quadrant_size("test") >= 10
    assert not set(labelled.train["text"]) & set(labelled.test["text"])
