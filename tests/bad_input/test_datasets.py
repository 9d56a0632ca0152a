"""Texts, given to the commands that read one, and to `sm.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.formats import build
from tests.bad_input.case import Case, check_call, check_command, rows
from tests.bad_input.conftest import coder

TO_ALL = [
    ("nowhere.txt", r"--dataset 'nowhere\.txt': there is no such file"),
    ("full/nowhere.parquet", r"--dataset 'full/nowhere\.parquet': there is no such file"),
    ("empty.txt", r"--dataset 'empty\.txt': it is empty"),
    ("empty.jsonl", r"--dataset 'empty\.jsonl': it is empty"),
    ("empty.parquet", r"--dataset 'empty\.parquet' cannot be read"),
    ("cut.jsonl", r"--dataset 'cut\.jsonl' cannot be read: JSON parse error"),
    ("no-text.jsonl", r"dataset: Dataset must have a .*'text'.* column.* Name one with rows of 'text'"),
    ("no-text.csv", r"dataset: Dataset must have a .*'text'.* column"),
    ("numbers.jsonl", r"dataset: a row cannot be read as text \(column 'text'\)"),
    ("nulls.jsonl", r"dataset: a row cannot be read as text \(column 'text'\)"),
    ("lists.jsonl", r"dataset: a row cannot be read as text \(column 'text'\)"),
    ("short.jsonl", r"dataset: it holds no full prompt"),
    ("foreign.jsonl", r"dataset: it has token 99999999, and this language model's ids are 0 to"),
    ("negative.jsonl", r"dataset: it has token -4, and this language model's ids are 0 to"),
    ("binary.txt", r"--dataset 'binary\.txt' cannot be read: 'utf-8'"),
    ("binary.parquet", r"--dataset 'binary\.parquet' cannot be read: Parquet"),
    ("good.text", r"--dataset 'good\.text': a file must be of text and end in \.txt, \.jsonl"),
    ("file", r"--dataset 'file': a file must be of text and end in \.txt"),
    ("empty", r"--dataset 'empty' cannot be read: .* doesn't contain any data files"),
    ("user/nothing", r"--dataset 'user/nothing' cannot be read: Couldn't reach 'user/nothing' on the Hub"),
    ("''", r"--dataset is needed"),
]
CALIBRATE = "sae --to saelens --out out --calibrate-l0 --l0 4 --model tiny --tokens 100 --dataset"
CASES = [
    *(
        Case("eval", f"sae --tokens 100 --ce-tokens 0 --context-size 8 --dataset {name}", says)
        for name, says in TO_ALL
    ),
    Case("compare", "sae topk --dataset empty.txt", r"--dataset 'empty\.txt': it is empty"),
    Case("compare", "sae topk --context-size 8 --dataset foreign.jsonl", r"dataset: it has token 99999999"),
    Case("export", f"{CALIBRATE} no-text.csv", r"dataset: Dataset must have a .*'text'.* column"),
    Case("export", f"{CALIBRATE} short.jsonl", r"dataset: it holds no full prompt"),
    Case("import", f"{CALIBRATE} cut.jsonl".replace("--to ", "--from "), r"'cut\.jsonl' cannot be read"),
    Case("hooks", "tiny --transcoder transcoder --dataset empty.txt", r"--dataset 'empty\.txt': it is empty"),
    Case("hooks", "tiny --transcoder transcoder --dataset nulls.jsonl", r"a row cannot be read as text"),
    Case("eval", "sae --dataset foreign.jsonl", r"context_size 8, but the provided context_size is 32"),
    Case("demo", "--out out --dataset good.txt", r"has no more than the 500 documents that are held out"),
    Case("demo", "--out out --dataset empty.txt", r"--dataset 'empty\.txt': it is empty"),
    Case("demo", "--out out --dataset binary.parquet", r"--dataset 'binary\.parquet' cannot be read"),
    Case("demo", "--out out --dataset user/nothing", r"--dataset 'user/nothing' cannot be read"),
]


@rows(CASES)
def test_a_text_that_cannot_be_read_is_one_error(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check_command(case, place, monkeypatch, capfd)


ROW = datasets.Dataset.from_dict({"text": ["x"]})
PYTHON = [
    Case("no rows", datasets.Dataset.from_dict({"text": []}), r"dataset: it is empty"),
    Case("no column of text", datasets.Dataset.from_dict({"a": ["x"]}), r"dataset: Dataset must have"),
    Case("one word", ROW, r"dataset: it holds no full prompt"),
    Case("numbers", datasets.Dataset.from_dict({"text": [3] * 9}), r"dataset: a row cannot be read as text"),
    Case("token beyond", torch.full((2, 32), 1 << 20), r"dataset: it has token 1048576"),
    Case("token below", torch.full((2, 32), -1), r"dataset: it has token -1"),
    Case("vectors", torch.zeros(2, 32, 8, dtype=torch.long), r"dataset: a torch\.int64 tensor of shape"),
    Case(
        "floats", torch.zeros(2, 32), r"dataset: a torch\.float32 tensor of shape \[2, 32\]; expected integer"
    ),
    Case("dict", {"text": ["x"]}, r"dataset is a dict, and must be a dataset of the datasets library"),
    Case("list of lists", [[1, 2]], r"dataset is a list, and must be .* a list of texts or of rows"),
    Case(
        "generator", iter([{"text": "x"}]), r"dataset is a list_iterator, .* IterableDataset.from_generator"
    ),
    Case(
        "splits",
        datasets.DatasetDict(train=ROW, test=ROW),
        r"dataset has the splits train, test: give one of them",
    ),
    Case("nothing", torch.zeros(0, 32, dtype=torch.long), r"shape \[0, 32\]; .* at least one"),
]


@rows([case._replace(given=case.entry) for case in PYTHON])
def test_evaluate_refuses_what_is_no_text(case: Case, tiny_model: HookedTransformer) -> None:
    dataset: Any = next(row.given for row in PYTHON if row.entry == case.entry)
    check_call(case, lambda: sm.evaluate(build(coder()), tiny_model, dataset, n_tokens=64, n_ce_tokens=0))
