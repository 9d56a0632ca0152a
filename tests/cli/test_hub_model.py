"""The demo on a model of the hub, through the real loading code, from an offline cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE, JumpReLUTranscoder
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from saelens_matryoshka.tiny import text
from tests.forked import run_command
from tests.formats.hub_cache import hub_cache, lay_out  # noqa: F401


def _save_tiny_gpt2(folder: Path) -> None:
    """With random weights and a small vocabulary."""
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.dataset("held_out")["text"][:5], vocab_size=400, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_ctx": 64, "n_embd": 32, "n_layer": 3, "n_head": 2}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.slow
def test_demo_runs_on_a_hub_model(tmp_path: Path, hub_cache: Path) -> None:  # noqa: F811
    _save_tiny_gpt2(tmp_path / "files")
    lay_out(hub_cache, "gpt2", tmp_path / "files")
    options = ["--model", "gpt2", "--layer", "1", "--tokens", "20000", "--k", "4"]
    done = run_command("demo", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    transcoder = SAE.load_from_disk(tmp_path / "output" / "demo-gpt2-layer-1")
    assert type(transcoder) is JumpReLUTranscoder
    assert transcoder.cfg.metadata.model_name == "gpt2"
    assert transcoder.cfg.metadata.hook_name == "blocks.1.ln2.hook_normalized"
