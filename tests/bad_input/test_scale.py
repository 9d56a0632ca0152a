"""`estimate`, `cache`, `samples`, `report` and `train --layers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input.case import Case, check_command, rows

TINY = "--preset tiny"
CASES = [
    Case("estimate", "--preset huge", r"--preset 'huge' is not known"),
    Case("estimate", f"{TINY} --cpu-memory much", r"--cpu-memory 'much' is no size"),
    Case("estimate", f"{TINY} --gpu-memory -3GB", r"--gpu-memory '-3GB' is no size"),
    Case("estimate", f"{TINY} --layer 99", r"--layer 99: the model has 4 layers"),
    Case("estimate", f"{TINY} --widht 3", r"widht"),
    Case("estimate", "--config nowhere.yaml", r"cannot be read: No such file"),
    Case("cache", "full", r"full"),
    Case("cache", "nowhere", r"nowhere"),
    Case("cache", "file --preset tiny --tokens 10k", r"file"),
    Case(
        "cache", "acts --verify --preset gpt2", r"--verify reads what is in the cache: leave out --preset\."
    ),
    Case("cache", "acts --verify --lr 1 --shard-mb 9", r"leave out --shard-mb --lr 1\."),
    Case("cache", f"acts {TINY} --layers 1 --tokens many", r"--tokens 'many' must be a number of tokens"),
    Case("cache", f"acts {TINY} --layers 9 --tokens 10k", r"the model has 4 layers"),
    Case("cache", f"acts {TINY} --layers 2-1 --tokens 10k", r"--layers '2-1' must be a range"),
    Case("cache", f"acts {TINY} --hook blocks.9.nothing --tokens 10k", r"blocks\.9\.nothing"),
    Case("train", f"{TINY} --out out --layers x", r"--layers 'x' must be a range"),
    Case("train", f"{TINY} --out out --layers 1,1", r"--layers '1,1' names a layer twice"),
    Case("train", f"{TINY} --out out --layers 3-4", r"the model has 4 layers"),
    Case("train", f"{TINY} --out out --layer 1 --layers 0-1", r"--layer 1 is of a single run"),
    Case("train", f"{TINY} --out out --layers 0-1 --shard dictionary", r"--shard dictionary divides"),
    Case("train", f"{TINY} --out out --shard rows", r"--shard rows is not known"),
    Case("train", f"{TINY} --out out --shard dictionary", r"torchrun"),
    Case("train", f"{TINY} --out out --shard dictionary --shards 2", r"torchrun"),
    Case("train", f"{TINY} --out out --shards 2", r"--shards 2 is of .*give --shard dictionary"),
    Case("train", f"{TINY} --out out --cache nowhere", r"nowhere"),
    Case("train", f"{TINY} --out out --cache full", r"full"),
    Case("samples", "nowhere", r"'nowhere' is no folder"),
    Case("samples", "full", r"'full' holds no SAE"),
    Case("samples", "sae --format pictures", r"'--format': .*'pictures'", 2),
    Case("samples", "sae --tokens 0", r"'--tokens': .* (equal to |x>=)1", 2),
    Case("samples", "sae --device gpu9", r"gpu9"),
    Case("report", "nowhere", r"nowhere"),
    Case("report", "full", r"full"),
    Case("report", "sae --tokens -1", r"'--tokens': .* (equal to |x>=)1", 2),
    Case("report", "sae --out full", r"full"),
]


@rows(CASES)
def test_a_wrong_argument_is_one_error(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check_command(case, place, monkeypatch, capfd)
