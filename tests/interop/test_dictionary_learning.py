"""dictionary_learning's own code and ours compute the same from the same file, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

import saelens_matryoshka as sm
from saelens_matryoshka.formats import converter, from_saelens
from saelens_matryoshka.formats.registry import FORMATS
from tests.formats.coders import WIDTHS, D, assert_same, expected_output, inputs, random_coder

pytest.importorskip("dictionary_learning", reason="it is not installed: nox -s dictionary_learning")

from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary

MAKE = {
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, 48, 5, [8, 16, 24]),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, 48, 5),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, 48, 5),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, 48),
}


def _written_by_them(folder: Path, dict_class: str) -> Any:
    torch.manual_seed(0)
    dictionary = MAKE[dict_class]()
    for parameter in dictionary.parameters():
        torch.nn.init.normal_(parameter)
    if dict_class == "JumpReluAutoEncoder":
        dictionary.threshold.data.abs_()
    else:
        dictionary.threshold.fill_(0.75)
    folder.mkdir()
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": 48, "k": 5, "layer": 3}
    trainer |= {"lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_3"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    dictionary, _ = load_dictionary(str(folder), "cpu")
    return dictionary


@pytest.mark.parametrize("dict_class", MAKE)
def test_what_they_write_computes_the_same_in_saelens(tmp_path: Path, dict_class: str) -> None:
    theirs = _written_by_them(tmp_path / "sae", dict_class)
    ours = SAE.load_from_disk(tmp_path / "sae", converter=converter("dictionary-learning"))
    x = inputs()
    torch.testing.assert_close(ours.encode(x), theirs.encode(x).detach())
    torch.testing.assert_close(ours(x), theirs(x).detach())
    assert ours.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert ours.cfg.metadata.context_size == 64
    if dict_class.startswith("Matryoshka"):
        assert sm.matryoshka_widths(ours) == WIDTHS
        narrow = sm.truncate(ours, WIDTHS[1])
        theirs.active_groups = 2
        torch.testing.assert_close(narrow(x), theirs(x).detach())


@pytest.mark.parametrize(
    ("kind", "dict_class", "exact"),
    [
        ({"uniform": True}, "MatryoshkaBatchTopKSAE", True),
        ({"uniform": True, "matryoshka_widths": None}, "BatchTopKSAE", True),
        ({}, "JumpReluAutoEncoder", False),  # b_dec moves into b_enc
        ({"subtract_b_dec": False}, "JumpReluAutoEncoder", True),
        ({"activation": "topk"}, "AutoEncoderTopK", True),
        ({"activation": "topk", "subtract_b_dec": False}, "AutoEncoderTopK", False),
        ({"activation": "relu"}, "MatryoshkaBatchTopKSAE", False),  # ReLU becomes a threshold of 0
    ],
    ids=str,
)
def test_what_we_write_computes_the_same_there(
    tmp_path: Path, kind: dict[str, Any], dict_class: str, exact: bool
) -> None:
    coder = random_coder(transcoder=False, **kind).with_metadata()
    save = FORMATS["dictionary-learning"].save
    save([coder], tmp_path)
    theirs, config = load_dictionary(str(tmp_path), "cpu")
    assert type(theirs).__name__ == dict_class == config["trainer"]["dict_class"]
    x = inputs()
    torch.testing.assert_close(theirs(x).detach(), expected_output(coder, x))
    # and what it would save again is what we wrote
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    again = SAE.load_from_disk(tmp_path, converter=converter("dictionary-learning"))
    exact = (
        kind.get("activation") != "relu"
        and dict_class != "JumpReluAutoEncoder"
        and "subtract_b_dec" not in kind
    )
    assert_same(from_saelens(again), coder, exact=exact)
