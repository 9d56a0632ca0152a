"""`samples` and `report` as a user calls them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import saelens_matryoshka.report.collect as collect
from saelens_matryoshka.cli import main
from saelens_matryoshka.cli.samples import writing_samples
from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics
from saelens_matryoshka.report import Samples
from saelens_matryoshka.report.feature_files import LOCK
from tests.report.conftest import D_SAE, random_sae

FEW = ("--tokens", 1500, "--context", 5, "--top", 3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a stock SAE, a log and an evaluation."""
    folder = tmp_path / "results" / "tiny" / "run"
    sae = random_sae()
    sae.save_model(folder)
    widths = sae.cfg.metadata.matryoshka_widths
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"tokens": 10 * i, "loss": 1 / i}) + "\n" for i in range(1, 9))
    )
    rows = [PrefixMetrics(width, 0.5, 0.5, 0.9, 4.0, 0, [], 0.0, None, None, None, None) for width in widths]
    result = EvalResult(rows, 100, 0, "blocks.1.hook_resid_post", "blocks.1.hook_resid_post", "raw")
    (folder / "metrics.json").write_text(result.to_json())
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call_(*args: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out + said.err

    return call_


def test_samples_are_written_in_every_format_asked_for(run: Path, call: Any) -> None:
    formats = [arg for name in ("json", "neuronpedia", "circuit-tracer") for arg in ("--format", name)]
    code, said = call("samples", run, *FEW, *formats, "--json", run / "summary.json")
    assert code == 0, said
    found = Samples.load(run / "samples")
    assert found.d_sae == D_SAE
    assert (run / "samples" / "json" / "collection_summary.json").is_file()
    assert (run / "samples" / "neuronpedia" / "batch-0.json").is_file()
    assert (run / "samples" / "circuit-tracer" / "features" / "layer_1.bin").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["n_tokens"] == found.n_tokens
    assert len(summary["written"]) == 4


def test_where_samples_are_is_told_as_it_is(
    run: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = call("samples", run, *FEW, "--out", "[bold]of[/] x")
    assert code == 0, said
    assert "written   [bold]of[/] x" in said


def test_a_second_call_takes_what_is_there_and_mixes_nothing(
    run: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("samples", run, *FEW)[0] == 0
    before = (run / "samples" / "samples.safetensors").read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr(collect, "collect_samples", None)  # not called
        code, said = call("samples", run, *FEW, "--format", "json")
    assert code == 0, said
    assert "samples are there" in said
    code, said = call("samples", run, *FEW, "--format", "json")
    assert code == 1
    assert "is there already: give --overwrite" in " ".join(said.split())
    code, said = call("samples", run, "--tokens", 3000)
    assert code == 1
    assert "n_tokens 1500, not 3000" in " ".join(said.split())
    code, said = call("samples", run, *FEW, "--skip", 2)
    assert code == 1
    assert "from document 2 on" in " ".join(said.split())
    assert (run / "samples" / "samples.safetensors").read_bytes() == before

    sae = random_sae()
    sae.W_enc.data *= 1.1
    sae.save_model(run)
    for command in ("samples", "report"):
        code, said = call(command, run, *(FEW if command == "samples" else ()))
        assert code == 1
        assert "other weights" in said
    assert call("samples", run, *FEW, "--overwrite")[0] == 0
    assert (run / "samples" / "samples.safetensors").read_bytes() != before
    assert not (run / "samples" / "json").exists(), "of the weights before"


def test_a_call_that_fails_leaves_no_folder(run: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(Samples, "save", failing)
    before = sorted(path.name for path in run.iterdir())
    assert call("samples", run, *FEW)[0] == 1
    assert sorted(path.name for path in run.iterdir() if path.name != ".samples.lock") == before


def test_feature_files_of_several_layers_go_into_one_folder(run: Path, call: Any, tmp_path: Path) -> None:
    features = tmp_path / "graphs" / "features"
    other = random_sae(hook="blocks.0.hook_resid_post")
    other.save_model(tmp_path / "other")
    for folder in (run, tmp_path / "other"):
        code, said = call("samples", folder, *FEW, "--format", "circuit-tracer", "--features", features)
        assert code == 0, said
    written = sorted(path.name for path in features.iterdir() if path.name != LOCK)
    assert written == ["index.json.gz", "layer_0.bin", "layer_1.bin"]
    code, said = call("samples", run, *FEW, "--format", "circuit-tracer", "--features", features)
    assert code == 1
    assert "has feature files of layer 1" in " ".join(said.split())


def test_a_report_of_a_run_holds_all_sections(run: Path, call: Any) -> None:
    code, said = call("report", run, "--tokens", 1500)
    assert code == 0, said
    page = (run / "report.html").read_text()
    assert "<h1>run</h1>" in page
    assert 'id="latent-data"' in page
    assert "Not evaluated yet" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").split('id="latent-data"')[0].lower()
    assert Samples.load(run / "samples").n_tokens < 1600


def test_a_report_without_samples_needs_no_language_model(run: Path, call: Any, tmp_path: Path) -> None:
    for name in ("metrics.json", "metrics.jsonl"):
        (run / name).unlink()
    out = tmp_path / "pages" / "page.html"
    code, said = call("report", run, "--no-samples", "--model", "none", "--out", out, "--title", "<mine>")
    assert code == 0, said
    assert "left out: what metrics.jsonl would show" in said
    page = out.read_text()
    assert "<h1>&lt;mine&gt;</h1>" in page
    assert "No samples were collected" in page
    assert not (run / "samples").exists()


def test_an_evaluation_with_nan_and_samples_of_one_token_make_a_page(run: Path, call: Any) -> None:
    text = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(text.replace('"fvu": 0.5', '"fvu": NaN'))
    code, said = call("report", run, "--tokens", 1)
    assert code == 0, said
    assert "NaN" not in (run / "report.html").read_text().split('id="latent-data"')[1]


def test_an_evaluation_of_another_tool_makes_a_page_of_what_it_has(run: Path, call: Any) -> None:
    row = {"width": D_SAE, "fvu": 0.5, "l0": 4.0, "dead_fraction": 0.25}
    for more in ({}, {"n_tokens": 9, "ce_clean": 3.0}, {"n_tokens": 9, "n_ce_tokens": 4, "ce_clean": 3.0}):
        (run / "metrics.json").write_text(json.dumps({"prefixes": [row], **more}))
        code, said = call("report", run, "--no-samples")
        assert code == 0, said
    page = (run / "report.html").read_text()
    assert "3.000 nats untouched, – with the target zero-ablated" in page


def _spoil(run: Path, what: str) -> list[Any]:
    match what:
        case "no folder":
            return ["report", run / "none"]
        case "a log of something else":
            (run / "metrics.jsonl").write_text("1\n2\n")
        case "the evaluation of another model":
            text = (run / "metrics.json").read_text().replace(f'"width": {D_SAE}', '"width": 97')
            (run / "metrics.json").write_text(text)
        case "settings that are no YAML":
            (run / "config.yaml").write_text("a: [1")
        case "settings that are no date":
            (run / "config.yaml").write_text("started_at: 2030-99-99\n")
        case "settings too deep":
            (run / "config.yaml").write_text("[" * 5_000)
        case "settings that stand for more than there is memory for":
            (run / "config.yaml").write_text("a: &a [1]\ncommand: [*a, *a]\n")
        case "something else in place of the samples":
            (run / "samples").mkdir()
            (run / "samples" / "notes.txt").touch()
            return ["samples", run, *FEW]
        case "intervals that do not halve":
            return ["samples", run, *FEW, "--intervals", 6]
        case "a hook without a layer":
            sae = random_sae(hook="hook_embed")
            sae.save_model(run)
            return ["samples", run, *FEW, "--format", "neuronpedia"]
        case "a page below a file":
            return ["report", run, "--no-samples", "--out", run / "cfg.json" / "page.html"]
    return ["report", run, "--no-samples"]


BAD = {
    "no folder": "is no folder",
    "a log of something else": "line 1: expected a JSON object",
    "the evaluation of another model": "evaluate it again",
    "settings that are no YAML": "is no YAML",
    "settings that are no date": "is no YAML: month must be in 1..12",
    "settings too deep": "is no YAML: maximum recursion depth exceeded",
    "settings that stand for more than there is memory for": "is no YAML: it has an alias",
    "something else in place of the samples": "holds something else than samples",
    "intervals that do not halve": "n_intervals=6 must be a power of two",
    "a hook without a layer": "does not say of which layer",
    "a page below a file": "page.html' cannot be written",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_error_and_no_page(case: str, run: Path, call: Any) -> None:
    code, said = call(*_spoil(run, case))
    assert code == 1
    assert BAD[case] in " ".join(said.split())
    assert "Traceback" not in said
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("command", [("samples", *FEW, "--overwrite"), ("report", "--tokens", 1500)])
def test_two_processes_do_not_write_the_same_samples(command: tuple[Any, ...], run: Path, call: Any) -> None:
    name, *options = command
    with writing_samples(run / "samples"):
        code, said = call(name, run, *options)
    assert code == 1
    assert "is in use: another process is writing samples there" in " ".join(said.split())
    assert not (run / "samples").exists()
    assert not (run / "report.html").exists()
    assert call(name, run, *options)[0] == 0


def test_the_samples_of_a_model_in_a_read_only_folder_are_beside_the_page(
    run: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelens_matryoshka.cli.report.obstacle", lambda path: run in path.parents or None)
    for _ in range(2):
        code, said = call("report", run, "--tokens", 1500, "--out", tmp_path / "page.html")
        assert code == 0, said
    assert Samples.load(tmp_path / "page.samples").d_sae == D_SAE
    assert not (run / "samples").exists()


def test_a_name_that_is_no_text_does_not_stop_the_page(run: Path, call: Any) -> None:
    code, said = call("report", run, "--no-samples", "--title", os.fsdecode(b"gr\xf6\xdfe"))
    assert code == 0, said
    assert "<title>gr??e" in (run / "report.html").read_text(encoding="utf-8")


def test_special_tokens_are_left_out_by_default(run: Path, call: Any) -> None:
    call("samples", run, *FEW)
    found = Samples.load(run / "samples")
    positions = found.top.positions[found.top.positions >= 0]
    assert not torch.isin(found.tokens.flatten()[positions], torch.tensor([0, 1, 2])).any()


@pytest.mark.parametrize(
    ("flags", "said"), [((), "special tokens left out"), (("--special-tokens",), "special tokens among them")]
)
def test_the_page_says_whether_special_tokens_are_among_the_tokens(
    flags: tuple[str, ...], said: str, run: Path, call: Any
) -> None:
    assert call("samples", run, *FEW, *flags)[0] == 0
    assert call("report", run)[0] == 0
    n_tokens = Samples.load(run / "samples").n_tokens
    assert f"On {n_tokens:,} tokens, {said}." in (run / "report.html").read_text()


def test_the_threshold_of_a_step_is_not_called_an_average(run: Path, call: Any) -> None:
    """With threshold_calibration="l0", a transcoder's default, it is the one of that batch."""
    (run / "metrics.jsonl").write_text('{"tokens": 10, "threshold": 0.5}\n{"tokens": 20, "threshold": 0.2}\n')
    assert call("report", run, "--no-samples")[0] == 0
    page = (run / "report.html").read_text()
    assert "smallest activation kept, or its average" in page
    assert "moving average" not in page


def test_report_gives_json_alone_and_says_what_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", "report", str(run), "--no-samples", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    page = run / "report.html"
    assert json.loads(capsys.readouterr().out) == {
        "page": str(page),
        "bytes": page.stat().st_size,
        "left_out": ["metrics.jsonl"],
    }


def test_a_misspelt_folder_is_recognised(run: Path, call: Any) -> None:
    code, said = call("report", str(run).replace("run", "rnu"), "--no-samples")
    assert code == 1
    assert f"did you mean {run}?" in " ".join(said.split())


def test_the_page_tells_how_the_run_was_made(run: Path, call: Any) -> None:
    (run / "config.yaml").write_text(
        "command: [train, --name, two words]\nlr: 0.007\nseed: 42\ntraining_tokens: 400000\nk: [odd]\n"
    )
    assert call("report", run, "--no-samples")[0] == 0
    page = (run / "report.html").read_text()
    assert "<dd>saelens-matryoshka train --name &#39;two words&#39;</dd>" in page
    for name, value in {
        "learning rate, at its highest": 0.007,
        "seed": 42,
        "training tokens": "400,000",
    }.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert "odd" not in page
