"""Folders of stock models out, those of other tools in: whole, prefixes, cards, and nothing half done."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE

import saelens_matryoshka as sm
from saelens_matryoshka.formats import Folder, FormatError, SparseCoder, build, export, load
from saelens_matryoshka.formats.export import export_models, import_models, stock_models
from saelens_matryoshka.formats.thresholds import fit_threshold
from tests.formats.coders import WIDTHS, expected_output, inputs, random_coder


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """Transcoders of three layers, the first evaluated."""
    for layer in range(3):
        build(random_coder(layer=layer)).save_model(tmp_path / "stock" / f"layer_{layer}")
    rows = [
        {"width": width, "fvu": 0.5, "l0": 3.0, "dead_fraction": 0.25, "ce_recovered": 0.75, "kl": None}
        for width in WIDTHS
    ]
    evaluation = {"n_tokens": 1234, "prefixes": rows}
    (tmp_path / "stock" / "layer_0" / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path / "stock"


def test_several_widths_are_sets_of_their_own(stock: Path, tmp_path: Path) -> None:
    written = export_models(stock, "circuit-tracer", tmp_path / "out", widths=[8, 48])
    assert written == [tmp_path / "out" / "width_8", tmp_path / "out" / "width_48"]
    for width, folder in zip((8, 48), written, strict=True):
        assert (
            yaml.safe_load((folder / "config.yaml").read_text())["feature_input_hook"]
            == "ln2.hook_normalized"
        )
        for model in import_models(str(folder), "circuit-tracer", tmp_path / f"back_{width}"):
            narrow = SAE.load_from_disk(tmp_path / f"back_{width}" / model.name)
            whole = SAE.load_from_disk(stock / model.name)
            x = inputs()
            assert torch.equal(narrow(x), sm.truncate(whole, width)(x))


def test_a_set_of_large_models_need_not_fit_into_memory(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[torch.Tensor]] = []

    def load_one(*arguments: Any) -> SparseCoder:
        gc.collect()
        assert not [tensor for tensor in read if tensor() is not None], "the layer before is still in memory"
        coder = load(*arguments)
        read.append(weakref.ref(coder.W_enc))
        return coder

    monkeypatch.setattr(export, "load", load_one)
    export_models(stock, "circuit-tracer", tmp_path / "out", widths=[8, 48])
    assert len(read) == 3
    import_models(str(tmp_path / "out" / "width_48"), "circuit-tracer", tmp_path / "back")
    assert len(read) == 6


def test_topk_is_of_the_prefix(tmp_path: Path) -> None:
    """Also where SAELens has no class for it: a skip transcoder that keeps k latents."""
    hooks = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.mlp.hook_out"}
    build(random_coder(skip=True, **hooks)).save_model(tmp_path / "stock")
    export_models(tmp_path / "stock", "sparsify", tmp_path / "out", widths=[24], topk=3)
    found = load(Folder(tmp_path / "out"), "layers.0.mlp", "sparsify")
    assert (found.d_sae, found.k, found.W_skip is not None) == (24, 3, True)
    assert torch.equal(found.W_enc, random_coder(skip=True).W_enc[:, :24])


def test_one_width_is_the_folder_itself(stock: Path, tmp_path: Path) -> None:
    assert export_models(stock, "saelens", tmp_path / "out", widths=[24]) == [tmp_path / "out"]
    sae = SAE.load_from_disk(tmp_path / "out" / "layer_1")
    assert sm.matryoshka_widths(sae) == [8, 24]
    evaluation = json.loads((tmp_path / "out" / "layer_0" / "evaluation.json").read_text())
    assert [row["width"] for row in evaluation["prefixes"]] == [8, 24]


def test_one_model_is_the_folder_itself_unless_it_is_uploaded(stock: Path, tmp_path: Path) -> None:
    export_models(stock / "layer_1", "saelens", tmp_path / "out")
    whole, x = SAE.load_from_disk(stock / "layer_1"), inputs()
    assert torch.equal(SAE.load_from_disk(tmp_path / "out")(x), whole(x))
    export_models(stock / "layer_1", "saelens", tmp_path / "up", repo_id="me/sae")
    assert torch.equal(SAE.load_from_disk(tmp_path / "up" / "layer_1")(x), whole(x))
    assert 'SAE.from_pretrained("me/sae", "layer_1")' in (tmp_path / "up" / "README.md").read_text()


def test_the_card_says_what_frame_metrics_and_how_to_load(stock: Path, tmp_path: Path) -> None:
    export_models(stock, "circuit-tracer", tmp_path / "out", repo_id="me/graphs")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "circuit-tracer"
    assert (
        "| layer_2 | `blocks.2.ln2.hook_normalized` | `blocks.2.hook_mlp_out` | 48 | 8, 24, 48 | JumpReLU |"
        in card
    )
    assert "the norm's output before its gain" in card
    assert "| layer_0 | 24 | 0.500 | 3.0 | 25.0% | 75.0% | - |" in card
    assert "on 1,234 tokens" in card, "of which text nobody knows here"
    assert 'ReplacementModel.from_pretrained("tiny", "me/graphs")' in card


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_card_of_a_trained_run_has_its_metrics(stock: Path, tmp_path: Path) -> None:
    (stock / "layer_0" / "evaluation.json").rename(stock / "layer_0" / "metrics.json")
    export_models(stock, "circuit-tracer", tmp_path / "out")
    assert "| layer_0 | 24 | 0.500 | 3.0 | 25.0% | 75.0% | - |" in _card(tmp_path / "out")


def test_the_card_does_not_depend_on_the_order_of_widths(stock: Path, tmp_path: Path) -> None:
    export_models(stock, "saelens", tmp_path / "up", widths=[8, 24, 48])
    export_models(stock, "saelens", tmp_path / "down", widths=[48, 24, 8])
    up, down = (sorted(_card(tmp_path / name).splitlines()) for name in ("up", "down"))
    assert up == down
    assert "| layer_0 | 48 | 0.500 | 3.0 | 25.0% | 75.0% | - |" in up


@pytest.mark.parametrize("widths", [[], [8], [8, 24]])
def test_the_cards_line_loads_what_was_written(
    widths: list[int], stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a single model that is not uploaded, which lies in the folder itself."""
    export_models(stock / "layer_1", "saelens", tmp_path / "out", widths=widths)
    (line,) = [line for line in _card(tmp_path / "out").splitlines() if line.startswith("sae = ")]
    monkeypatch.chdir(tmp_path / "out")
    loaded = {"SAE": SAE}
    monkeypatch.setattr(SAE, "from_pretrained", lambda _repo, inside: SAE.load_from_disk(inside))
    exec(line, loaded)
    assert loaded["sae"].cfg.d_sae == max(widths, default=48)


def test_a_changed_model_has_no_metrics_in_its_card(stock: Path, tmp_path: Path) -> None:
    export_models(
        stock,
        "circuit-tracer",
        tmp_path / "out",
        change=lambda coder: fit_threshold(coder, inputs(500), l0=3),
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Metrics" not in card
    assert "thresholds fitted to an L0 of 3" in card


def test_a_refusal_leaves_nothing_behind(stock: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for format, widths in (
        ("sparsify", []),
        ("dictionary-learning", []),
        ("circuit-tracer", [99]),
        ("nope", []),
    ):
        with pytest.raises((FormatError, ValueError)):
            export_models(stock, format, tmp_path / "out", widths=widths)
    with pytest.raises(FormatError, match="'llamascopium' is only read; saelens, sparsify"):
        export_models(stock, "llamascopium", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_written_over(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_models(stock, "circuit-tracer", tmp_path / "out")  # an empty folder is fine
    mine = (tmp_path / "out" / "config.yaml").read_text()
    with pytest.raises(FileExistsError, match="not empty"):
        export_models(stock, "saelens", tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        import_models(str(stock), "saelens", tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").read_text() == mine


def test_an_empty_folder_is_taken_where_nothing_is_renamed_over_it(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, by either name of renaming."""

    def renaming(rename: Any) -> Any:
        def only_where_nothing_is(path: Path, target: Path) -> Path:
            if target.exists():
                raise FileExistsError(target)
            return rename(path, target)

        return only_where_nothing_is

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    (tmp_path / "out").mkdir()
    export_models(stock, "circuit-tracer", tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds no SAELens model"):
        export_models(tmp_path / "empty", "saelens", tmp_path / "out")
    with pytest.raises(FormatError, match="is not a folder"):
        export_models(tmp_path / "missing", "saelens", tmp_path / "out")


def test_a_source_in_another_format_than_said_is_recognised(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nothing in the format 'sparsify'. It looks like saelens"):
        import_models(str(stock), "sparsify", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"in the format 'sparsify'\.$"):
        import_models(str(tmp_path / "notes.txt"), "sparsify", tmp_path / "out")


def test_a_file_in_place_of_a_model_s_folder_is_said_to_be_one(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cfg\.json holds nothing .* name the folder that they are in"):
        import_models(str(stock), "saelens", tmp_path / "out", item="layer_0/cfg.json")


def test_an_id_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for layer in range(12):
        build(random_coder(layer=layer)).save_model(tmp_path / "stock" / f"layer_{layer}")
    held = r"The ids there are layer_0, layer_1, .*, layer_9 and 2 more\.$"
    with pytest.raises(FormatError, match=rf"no file 'stock/layer_12/\S+'\. {held}"):
        import_models(str(tmp_path / "stock"), "saelens", tmp_path / "out", item="layer_12")


def test_an_empty_id_is_not_taken_for_all(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--id '' names nothing"):
        import_models(str(stock), "saelens", tmp_path / "out", item="")


def test_checkpoints_below_a_model_are_not_taken_for_layers(tmp_path: Path) -> None:
    build(random_coder()).save_model(tmp_path / "sae")
    build(random_coder()).save_model(tmp_path / "sae" / "checkpoint_1000")
    assert stock_models(tmp_path / "sae") == [tmp_path / "sae"]


@pytest.mark.parametrize("format", ["sparsify", "dictionary-learning"])
def test_saes_go_out_and_come_back(format: str, tmp_path: Path) -> None:
    activation = "topk" if format == "sparsify" else "jumprelu"
    coders: list[SparseCoder] = [
        random_coder(activation, transcoder=False, uniform=True, layer=layer) for layer in range(2)
    ]
    for layer, coder in enumerate(coders):
        build(coder).save_model(tmp_path / "stock" / f"layer_{layer}")
    export_models(tmp_path / "stock", format, tmp_path / "out")
    models = import_models(str(tmp_path / "out"), format, tmp_path / "back")
    assert [model.name for model in models] == ["layer_0", "layer_1"]
    x = inputs()
    for layer, coder in enumerate(coders):
        sae = SAE.load_from_disk(tmp_path / "back" / f"layer_{layer}")
        torch.testing.assert_close(sae(x), expected_output(coder, x))
        assert sm.matryoshka_widths(sae) == WIDTHS


def test_folders_may_be_named_by_strings(tmp_path: Path) -> None:
    build(random_coder()).save_model(tmp_path / "model")
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "imported")
    assert export_models(str(tmp_path / "model"), "saelens", exported) == [Path(exported)]
    import_models(exported, "saelens", imported)
    assert (tmp_path / "imported" / "cfg.json").is_file()
