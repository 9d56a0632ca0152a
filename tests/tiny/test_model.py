"""The shipped model: small, better than token frequencies, and the same behind every loader."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.load_model import load_model
from torch import Tensor
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from saelens_matryoshka import tiny
from saelens_matryoshka.tiny import text, train
from saelens_matryoshka.tiny.card import next_token_loss
from saelens_matryoshka.tiny.packing import pack, windows

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def hf_model() -> Gemma2ForCausalLM:
    return tiny.load_hf_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.load_tokenizer()


@pytest.fixture(scope="module")
def held_out(hf_model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """64 windows spread evenly over the held-out split, shape (64, context + 1)."""
    stream = pack(text.dataset("held_out")["text"], tokenizer)
    every = windows(stream, hf_model.config.max_position_embeddings)
    return every[:: len(every) // 64][:64]


@pytest.fixture(scope="module")
def logits(hf_model: Gemma2ForCausalLM, held_out: Tensor) -> Tensor:
    """The reference logits of four held-out windows, shape (4, context, vocabulary)."""
    with torch.no_grad():
        return hf_model(held_out[:4, :-1]).logits


def card_figure(row: str) -> float:
    """Reads one figure, in nats per token, from the model card."""
    card = (tiny.PATH / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {row} \| ([0-9.]+) \|$", card, flags=re.MULTILINE)
    assert found, f"the model card has no row {row!r}"
    return float(found.group(1))


def load(name: str) -> Any:
    if name == "hooked_transformer":
        return tiny.load_hooked_transformer()
    if name == "hooked_transformer_folded":
        return tiny.load_hooked_transformer(fold_ln=True)
    if name == "bridge":
        return tiny.load_bridge()
    # transformers may choose another attention, which in some releases leaves out Gemma-2's capping of logits
    eager = {"attn_implementation": "eager"}
    return load_model("AutoModelForCausalLM", str(tiny.PATH), model_from_pretrained_kwargs=eager)


LOADERS = ["hooked_transformer", "hooked_transformer_folded", "bridge", "sae_lens"]


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_gives_the_same_logits_on_held_out_text(
    name: str, held_out: Tensor, logits: Tensor
) -> None:
    with torch.no_grad():
        got = load(name)(held_out[:4, :-1])
    assert got.dtype == torch.float32
    assert (got - logits).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_brings_the_tokenizer(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = load(name)
    assert model.tokenizer.bos_token == "<bos>"
    assert model.tokenizer.bos_token_id == tokenizer.bos_token_id
    document = text.dataset("held_out")["text"][0]  # longer than the context
    # The call of SAELens's activation store, which puts in `<bos>` tokens itself.
    tokens = model.to_tokens(
        document, prepend_bos=False, truncate=False, move_to_device=False, padding_side=None
    )
    assert tokens[0].tolist() == tokenizer(document)["input_ids"]


def test_hf_model_is_a_float32_gemma2_in_eval_mode_with_eager_attention(
    hf_model: Gemma2ForCausalLM,
) -> None:
    assert isinstance(hf_model, Gemma2ForCausalLM)
    assert {parameter.dtype for parameter in hf_model.parameters()} == {torch.float32}
    assert not hf_model.training
    assert hf_model.config._attn_implementation == "eager"


def test_fold_ln_removes_the_norm_gains() -> None:
    assert tiny.load_hooked_transformer().cfg.normalization_type == "RMS"
    assert tiny.load_hooked_transformer(fold_ln=True).cfg.normalization_type == "RMSPre"


def test_tokenizer_round_trips_any_text_and_adds_nothing(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for document in ["def f(x):\n    return x ** 2\n", "naïve 猫 \x00\t\r\n"]:
        assert tokenizer.decode(tokenizer(document)["input_ids"]) == document
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>"]) == [0, 1, 2]


def test_loading_is_silent_and_stays_off_the_network(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    looked_up: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        looked_up.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    tiny.load_hf_model()
    tiny.load_tokenizer()
    tiny.load_hooked_transformer()
    tiny.load_bridge()
    assert looked_up == []
    assert [str(warning.message) for warning in recwarn] == []
    assert "".join(capfd.readouterr()) == ""


def test_held_out_loss_is_the_model_cards(hf_model: Gemma2ForCausalLM, held_out: Tensor) -> None:
    with torch.no_grad():
        loss = next_token_loss(hf_model, held_out).item()
    # The card averages over the whole split of one Python version, this over a sample of another.
    assert loss == pytest.approx(card_figure("Held-out loss"), rel=0.1)
    assert loss < 0.6 * card_figure("Unigram entropy of the held-out tokens")


def test_weights_folder_is_small_enough_to_ship(hf_model: Gemma2ForCausalLM) -> None:
    assert 1_000_000 < hf_model.num_parameters() < 2_000_000
    files = list(tiny.PATH.iterdir())
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_training_script_makes_a_loadable_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights"
    sizes = {
        "steps": 2,
        "max-files": 4,
        "vocab-size": 300,
        "hidden-size": 16,
        "intermediate-size": 32,
        "layers": 2,
        "heads": 2,
        "kv-heads": 1,
        "head-dim": 8,
        "context": 32,
        "batch-size": 2,
        "threads": torch.get_num_threads(),
    }
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    with torch.random.fork_rng():
        train.main([f"--out={out}", *arguments])
    assert "step 2/2" in capsys.readouterr().out

    monkeypatch.setattr(tiny, "PATH", out)
    tokens = tiny.load_tokenizer()("import os\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = tiny.load_hf_model()(tokens).logits
        assert expected.shape == (*tokens.shape, 300)
        got = tiny.load_hooked_transformer()(tokens)
    assert (got - expected).abs().max().item() < TOLERANCE
    assert card_figure("Held-out loss") > 0


def test_training_script_refuses_too_little_text(tmp_path: Path) -> None:
    with torch.random.fork_rng(), pytest.raises(ValueError, match="not enough for one batch"):
        train.main(
            [
                f"--out={tmp_path}",
                "--max-files=1",
                "--batch-size=9999",
                "--layers=1",
                f"--threads={torch.get_num_threads()}",
            ]
        )
