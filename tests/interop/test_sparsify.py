"""sparsify's own code and ours compute the same from the same file, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from saelens_matryoshka.formats import Folder, converter, from_saelens
from saelens_matryoshka.formats.registry import FORMATS, load
from saelens_matryoshka.formats.thresholds import fit_threshold
from tests.formats.coders import D, assert_same, expected_output, inputs, random_coder

sparsify = pytest.importorskip("sparsify", reason="sparsify is not installed: nox -s sparsify")

MLP = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.mlp.hook_out", "input_frame": None}


def _theirs(coder: Any, x: torch.Tensor) -> torch.Tensor:
    return coder(x).sae_out.detach()


def _written_by_sparsify(folder: Path, **settings: Any) -> Any:
    cfg = sparsify.SparseCoderConfig(**{"num_latents": 48, "k": 5, **settings})
    coder = sparsify.SparseCoder(D, cfg)
    torch.manual_seed(0)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter)
    coder.save_to_disk(folder)
    return sparsify.SparseCoder.load_from_disk(folder)


@pytest.mark.parametrize(
    "settings", [{"transcode": True}, {}, {"num_latents": 0, "expansion_factor": 3}, {"k": 48}], ids=str
)
def test_what_sparsify_writes_computes_the_same_in_saelens(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = _written_by_sparsify(tmp_path / "layers.3.mlp", **settings)
    ours = SAE.load_from_disk(tmp_path / "layers.3.mlp", converter=converter("sparsify"))
    x = inputs()
    torch.testing.assert_close(ours(x), _theirs(theirs, x))
    assert ours.cfg.metadata.hook_name == "blocks.3.mlp." + (
        "hook_in" if "transcode" in settings else "hook_out"
    )


def test_a_skip_transcoder_of_sparsify_is_read_and_gets_thresholds(tmp_path: Path) -> None:
    theirs = _written_by_sparsify(tmp_path / "layers.3.mlp", transcode=True, skip_connection=True)
    coder = load(Folder(tmp_path), "layers.3.mlp", "sparsify")
    x = inputs(512)
    torch.testing.assert_close(expected_output(coder, x), _theirs(theirs, x))
    fitted = fit_threshold(coder, x, l0=5)
    assert fitted.threshold is not None
    active = ((x @ fitted.W_enc + fitted.b_enc) > fitted.threshold).float().sum(dim=-1).mean()
    assert abs(active - 5) < 0.05


@pytest.mark.parametrize(
    "kind",
    [
        {"activation": "topk", **MLP},
        {"activation": "relu", **MLP},
        {"activation": "relu", "skip": True, **MLP},
        {"activation": "topk", "transcoder": False, "hook_name": "blocks.3.hook_resid_post"},
    ],
    ids=str,
)
def test_what_we_write_computes_the_same_in_sparsify(tmp_path: Path, kind: dict[str, Any]) -> None:
    coder = random_coder(**kind)
    save = FORMATS["sparsify"].save
    save([coder], tmp_path)
    (theirs,) = sparsify.SparseCoder.load_many(str(tmp_path), local=True).values()
    x = inputs()
    torch.testing.assert_close(_theirs(theirs, x), expected_output(coder, x))


def test_what_sparsify_writes_again_is_what_we_wrote(tmp_path: Path) -> None:
    coder = random_coder("topk", **MLP)
    save = FORMATS["sparsify"].save
    (tmp_path / "a").mkdir()
    save([coder], tmp_path / "a")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "a" / "layers.3.mlp")
    theirs.save_to_disk(tmp_path / "b" / "layers.3.mlp")
    sae = SAE.load_from_disk(tmp_path / "b" / "layers.3.mlp", converter=converter("sparsify"))
    assert_same(from_saelens(sae), coder)
