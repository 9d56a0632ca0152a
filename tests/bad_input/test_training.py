"""`train`, `presets` and `runs`: flags, settings in YAML, and folders of runs.

Flags and files one by one are in tests/runs/test_settings.py; here they go through the command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from saelens_matryoshka.cli import main
from tests.bad_input.case import Case, check_command, rows

GOOD: dict[str, Any] = {
    "model_name": "tiny",
    "architecture": "matryoshka_sae",
    "layer": 1,
    "d_sae": 64,
    "k": 4,
    "training_tokens": 1_000_000,
}
RUN = {**GOOD, "started_at": "2030-01-01T00:00:00+00:00", "completed_at": "2030-01-01T01:00:00+00:00"}
TINY = "--preset tiny --out out"
CASES = [
    Case("train", "--preset huge", r"--preset 'huge' is not known"),
    Case("train", "--preset ../tiny", r"--preset '\.\./tiny' is not known"),
    Case("train", "--preset ''", r"--preset '' is not known"),
    Case("train", f"{TINY} --layer many", r"'--layer': .* valid integer", 2),
    Case("train", f"{TINY} --layer 99", r"--layer 99: the model has 4 layers, 0 to 3"),
    Case("train", f"{TINY} --mapping ''", r"--mapping '' is not known.*There are mlp"),
    Case("train", f"{TINY} --mapping cross-layer:1", r"--mapping 'cross-layer:1' is not known"),
    Case("train", f"{TINY} --log-every 0", r"'--log-every': .* (equal to |x>=)1", 2),
    Case("train", f"{TINY} --lr nan", r"--lr .*nan"),
    Case("train", f"{TINY} --training_tokens 0", r"--training_tokens 0"),
    Case("train", f"{TINY} --training_tokens 1e400", r"--training_tokens '1e400': expected a whole number"),
    Case("train", f"{TINY} --device gpu9", r"--device .*gpu9"),
    Case("train", f"{TINY} --dtype float12", r"--dtype .*float12"),
    Case("train", f"{TINY} --name CON", r"--name 'CON' is reserved on Windows: choose another"),
    Case("train", f"{TINY} --name con.txt", r"--name 'con\.txt' is reserved on Windows"),
    Case("train", f"{TINY} --name a:b", r"--name 'a:b': ':' cannot be in the name of a folder everywhere"),
    Case("train", f"{TINY} --name a/b", r"--name 'a/b': '/' cannot be in the name of a folder everywhere"),
    Case("train", f"{TINY} --name ..", r"--name '\.\.' must not start with a dot"),
    Case("train", f"{TINY} --name a.", r"--name 'a\.' must not .* end with a dot"),
    Case("train", f"{TINY} --name ''", r"--name is empty"),
    Case("train", f"{TINY} --name {'x' * 200}", r"--name is 200 bytes long: at most 120"),
    Case("train", "--preset tiny --out file --name a", r"cannot be made: .*file is a file\. Choose another"),
    Case("train", "--preset tiny --out file/x --name a", r"cannot be made: .*file is a file"),
    Case(
        "train",
        "--preset tiny --output_path full",
        r"full holds other files\. Choose another --name or --out",
    ),
    Case(
        "train", "--preset tiny --output_path sae", r"sae holds other files\. Choose another --name or --out"
    ),
    Case("train", "--preset tiny --output_path file", r"file is a file, and was to be the run's folder"),
    Case(
        "train", "--preset tiny --output_path a --out b", r"--output_path is the run's folder, .*: give one"
    ),
    # files of settings
    Case("train", "--config nowhere.yaml", r"--config 'nowhere\.yaml' cannot be read: No such file"),
    Case("train", "--config full", r"--config 'full' cannot be read: Is a directory"),
    Case("train", "--config empty.txt", r"empty\.txt must be a mapping of settings to values"),
    Case("train", "--config binary.txt", r"--config 'binary\.txt' cannot be read: not a text file"),
    Case("train", "--config huge.yaml", r"--config 'huge\.yaml' is larger than any settings"),
    Case("train", "--config deep.yaml", r"deep\.yaml is not YAML: "),
    Case(
        "train",
        "--config alias.yaml",
        r"alias\.yaml is not YAML: it has an alias \(\*name\): write the value",
    ),
    Case("train", "--config date.yaml", r"date\.yaml is not YAML: month must be in 1\.\.12"),
    Case("train", "--config key.yaml", r"key\.yaml is not YAML: .*unhashable key"),
    Case("train", "--config object.yaml", r"object\.yaml is not YAML: could not determine a constructor"),
    Case("train", "--config number.yaml", r"d_sae \(number\.yaml\) inf: expected a whole number"),
    Case("train", "--config list.yaml", r"list\.yaml must be a mapping of settings to values"),
    Case(
        "train", "--config misspelt.yaml", r"d_sea \(misspelt\.yaml\) is not a setting; did you mean d_sae\?"
    ),
    Case("train", "--config preset.yaml", r"preset \(preset\.yaml\) 3: expected text, in quotes\."),
    Case("train", "--config name.yaml", r"name \(name\.yaml\) 2024: expected text, in quotes\."),
    # presets and runs
    Case("presets", "huge", r"--preset 'huge' is not known"),
    Case("presets", "../tiny", r"--preset '\.\./tiny' is not known"),
    Case("runs", "nowhere", r"'nowhere' is no folder\. Runs are kept in `results`, or where --out says"),
    Case("runs", "file", r"'file' is no folder\. Runs are kept in `results`"),
]
FILES = {
    "huge.yaml": "a: " + "x" * (1 << 17),
    "deep.yaml": "[" * 5_000,
    "alias.yaml": "a: &a [1]\nb: *a\n",
    "date.yaml": "seed: 2030-99-99\n",
    "key.yaml": "? [a]\n: 1\n",
    "object.yaml": "!!python/object/apply:os.mkdir [harm]\n",
    "number.yaml": yaml.safe_dump({**GOOD, "d_sae": float("inf")}),
    "list.yaml": "- d_sae\n",
    "misspelt.yaml": "d_sea: 64\n",
    "preset.yaml": "preset: 3\n",
    "name.yaml": "preset: tiny\nname: 2024\n",
}


@pytest.fixture(scope="module")
def with_files(place: Path) -> Iterator[Path]:
    """The folder, with files of settings too."""
    for name, text in FILES.items():
        (place / name).write_text(text)
    yield place
    for name in FILES:
        (place / name).unlink()


@rows(CASES)
def test_a_wrong_setting_is_one_error(
    case: Case, with_files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check_command(case, with_files, monkeypatch, capfd)


def _line(**changes: Any) -> str:
    line = {"tokens": 9, "fvu_per_prefix": {"64": 0.5}, "l0": 4.0, "dead": 0.0}
    return json.dumps({**line, **changes})


ROW = {"width": 64, "fvu": 0.5, "l0": 4.0, "dead_fraction": 0.0, "ce_recovered": 0.9, "kl": 0.1}
DAMAGE: dict[str, dict[str, str]] = {
    "config-empty": {"config.yaml": ""},
    "config-deep": {"config.yaml": "[" * 5_000},
    "config-date": {"config.yaml": "started_at: 2030-99-99"},
    "config-alias": {"config.yaml": "started_at: &a [1]\nx: *a"},
    "config-bare": {"config.yaml": "started_at: now"},
    "config-types": {"config.yaml": yaml.safe_dump({**RUN, "k": "many", "training_tokens": "all"})},
    "model-number": {"config.yaml": yaml.safe_dump({**RUN, "model_name": 7, "d_sae": None})},
    "log-latin-1": {"metrics.jsonl": "\udce9"},
    "log-list": {"metrics.jsonl": "[1]\n"},
    "log-prefixes": {"metrics.jsonl": _line(fvu_per_prefix=[1])},
    "log-none": {"metrics.jsonl": _line(fvu_per_prefix={})},
    "log-text": {"metrics.jsonl": _line(l0="four", tokens="nine")},
    "metrics-cut": {"metrics.json": "{"},
    "metrics-list": {"metrics.json": "[]"},
    "metrics-text": {"metrics.json": json.dumps({"prefixes": [{**ROW, "fvu": "low"}]})},
    "metrics-prefixes": {"metrics.json": json.dumps({"prefixes": {"a": 1}})},
    "metrics-none": {"metrics.json": json.dumps({"prefixes": []})},
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_does_not_hide_the_others(
    damage: str,
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"config.yaml": yaml.safe_dump(RUN), "metrics.json": json.dumps({"prefixes": [ROW]})}
    for name, files in {"good": good, damage: {"config.yaml": yaml.safe_dump(RUN), **DAMAGE[damage]}}.items():
        folder = tmp_path / "results" / "tiny" / "layer-1" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    arguments = ["runs", str(tmp_path / "results"), *(["--json"] if as_json else ["--prefixes"])]
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    assert "good" in said.out
