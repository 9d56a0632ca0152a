from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, LanguageModelSAETrainingRunner
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.cli import main
from tests.helpers import runner_config, transcoder_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, token_dataset: datasets.Dataset) -> Path:
    """Three trained models in stock folders, and a checkpoint."""
    root = tmp_path_factory.mktemp("models")
    model = tiny.load_hooked_transformer()
    sae = sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[16, 64])
    for name, cfg in {
        "first": runner_config(transcoder_config(), checkpoint_path=str(root / "c"), n_checkpoints=1),
        "second": runner_config(transcoder_config(d_sae=128, matryoshka_widths=[128])),
        "sae": runner_config(sae, hook_name="blocks.1.hook_resid_post"),
    }.items():
        cfg.output_path = str(root / name)
        LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=token_dataset).run()
    return root


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    """Exit code, and what was printed."""
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out + said.err


def test_eval_prints_the_table_of_every_prefix_within_80_columns(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _run(monkeypatch, capsys, "eval", folders / "first", "--tokens", 500, "--ce-tokens", 200)
    assert code == 0
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    widths = [line.split()[0] for line in lines if line.strip()[:1].isdigit() and "%" in line]
    assert widths[:3] == ["32", "96", "256"]
    assert "text: held-out standard library files" in said


def test_eval_gives_the_numbers_of_the_function(
    folders: Path,
    tmp_path: Path,
    tiny_model: HookedTransformer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"def f_{i}(x):\n    return x + {i}\n" * 30} for i in range(12)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    code, said = _run(
        monkeypatch, capsys, "eval", folders / "first", "--dataset", text, "--tokens", 400,
        "--ce-tokens", 100, "--skip", 2, "--json", "-",
    )  # fmt: skip
    assert code == 0
    expected = sm.evaluate(
        SAE.load_from_disk(folders / "first"),
        tiny_model,
        datasets.Dataset.from_list(rows[2:]),
        n_tokens=400,
        n_ce_tokens=100,
    )
    assert json.loads(said) == json.loads(expected.to_json())


def test_json_is_alone_on_standard_output_whatever_libraries_print(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = tiny.load_hooked_transformer

    def load_aloud() -> HookedTransformer:
        print("Loaded pretrained model tiny into HookedTransformer")  # as TransformerLens does
        return load()

    monkeypatch.setattr(tiny, "load_hooked_transformer", load_aloud)
    arguments = ("eval", str(folders / "first"), "--tokens", "300", "--ce-tokens", "0", "--json")
    monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *arguments])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert json.loads(said.out)["n_ce_tokens"] == 0
    assert "Loaded pretrained model" in said.err
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"


def test_a_checkpoint_is_evaluated_as_the_model_it_would_be_saved_as(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = [path.parent for path in folders.glob("c/**/cfg.json")]
    code, said = _run(
        monkeypatch, capsys, "eval", checkpoint, "--tokens", 300, "--ce-tokens", 0, "--json", "-"
    )
    assert code == 0
    assert [row["width"] for row in json.loads(said)["prefixes"]] == [32, 96, 256]


def test_compare_measures_all_on_the_same_tokens(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "numbers.json"
    code, said = _run(
        monkeypatch, capsys, "compare", folders / "first", folders / "second", "--tokens", 400,
        "--ce-tokens", 100, "--json", out,
    )  # fmt: skip
    assert code == 0, said
    assert max(map(len, said.splitlines())) <= 80 + len(str(out))
    numbers = json.loads(out.read_text())
    assert numbers["first"]["n_tokens"] == numbers["second"]["n_tokens"]
    assert numbers["first"]["ce_clean"] == numbers["second"]["ce_clean"]
    assert len(numbers["first"]["prefixes"]) == 3
    assert len(numbers["second"]["prefixes"]) == 1


def test_compare_says_when_a_model_was_made_for_another_frame(tiny_model: HookedTransformer) -> None:
    def identity(scale: float) -> JumpReLUSAE:
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=256))
        sae.cfg.metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post")
        eye = torch.eye(128)
        sae.W_enc.data = scale * torch.cat([eye, -eye], dim=1)
        sae.W_dec.data = torch.cat([eye, -eye])
        sae.threshold.data.zero_()
        return sae

    saes = {"right": identity(1.0), "wrong": identity(3.0)}
    tokens = torch.randint(3, 1000, (8, 32))
    comparison = sm.compare(saes, tiny_model, tokens, n_ce_tokens=0)
    console = Console(width=80, file=io.StringIO())
    with console.capture() as printed:
        console.print(comparison.tables())
    right, _, wrong = printed.get().partition("wrong reads")
    assert "another frame" not in right
    assert "another frame" in wrong
    saes["right"].cfg.metadata.input_frame = "normalized"
    with pytest.raises(ValueError, match="input_frame"):
        sm.compare(saes, tiny_model, tokens)


BAD = {
    "no such folder": (["eval", "nowhere"], "'nowhere' is no folder"),
    "a folder without a model": (["eval", "{root}"], "holds no SAE"),
    "a release that does not exist": (["eval", "{root}/first/cfg.json"], "is no folder"),
    "no such file": (["eval", "{root}/first", "--dataset", "no.jsonl"], "there is no such file"),
    "no such model": (["eval", "{root}/first", "--model", "gpt-9"], "model 'gpt-9' is not one"),
    "no tokens": (["eval", "{root}/first", "--tokens", "0"], "--tokens"),
    "nothing left": (["eval", "{root}/first", "--skip", "100000"], "--skip 100000 leaves nothing"),
    "different targets": (["compare", "{root}/first", "{root}/sae"], "hook_name_out differs"),
    "the same twice": (["compare", "{root}/first", "{root}/first"], "given twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_error_and_writes_nothing(
    case: str,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    args = [arg.format(root=folders) for arg in args]
    code, said = _run(monkeypatch, capsys, *args, "--json", tmp_path / "out.json")
    assert code in (1, 2)
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_eval_and_compare_draw_and_write_tables(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot, table = tmp_path / "plot.svg", tmp_path / "table.md"
    code, said = _run(
        monkeypatch, capsys, "compare", folders / "first", folders / "second", "--tokens", 300,
        "--ce-tokens", 60, "--plot", plot, "--table", table,
    )  # fmt: skip
    assert code == 0, said
    assert plot.read_text().count("<svg") == 1
    rows = [line.split(" | ")[:2] for line in table.read_text().splitlines()[2:]]
    assert rows == [["| first", "32"], ["| first", "96"], ["| first", "256"], ["| second", "128"]]
    page = tmp_path / "page.html"
    code, said = _run(
        monkeypatch, capsys, "eval", folders / "first", "--tokens", 300, "--ce-tokens", 0, "--plot", page
    )
    assert code == 0, said
    assert f"written: {page}" in said.replace("\n", "")
    assert page.is_file()


def test_a_model_in_the_current_folder_has_its_name_in_the_table(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders / "first")
    table = tmp_path / "table.csv"
    few = ("--tokens", 300, "--ce-tokens", 0, "--table", table)
    code, said = _run(monkeypatch, capsys, "compare", ".", folders / "second", *few)
    assert code == 0, said
    assert "first reads" in said
    assert table.read_text().splitlines()[1].startswith("first,")


def test_a_plot_that_could_not_be_written_is_refused_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _run(monkeypatch, capsys, "eval", tmp_path / "nothing", "--plot", tmp_path / "plot.xyz")
    assert code == 1
    assert "plot.xyz" in said.replace("\n", "")


@pytest.mark.parametrize("option", ["--plot", "--table"])
def test_what_cannot_be_written_is_refused_before_the_evaluation(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    path = tmp_path / "file" / ("a.svg" if option == "--plot" else "a.csv")
    code, said = _run(monkeypatch, capsys, "compare", tmp_path / "nothing", option, path)
    assert code == 1
    assert f"{option} '{path}' cannot be written" in " ".join(said.split())
