"""The demo on a model of the hub, through the real loading code, from an offline cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, JumpReLUTranscoder
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from saelens_matryoshka.tiny import text


def _lay_out_hub_cache(cache: Path) -> None:
    """A tiny random GPT-2 where the hub's client expects `gpt2`."""
    repository = cache / "models--gpt2"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.dataset("held_out")["text"][:5], vocab_size=400, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save_model(str(snapshot))
    tokenizer = GPT2TokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=64)
    tokenizer.save_pretrained(snapshot)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_ctx": 64, "n_embd": 32, "n_layer": 3, "n_head": 2}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes)
    GPT2LMHeadModel(config).save_pretrained(snapshot)


@pytest.mark.slow
def test_demo_runs_on_a_hub_model(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    _lay_out_hub_cache(cache)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "COLUMNS": "80"}
    command = "from saelens_matryoshka.cli import main; main()"
    options = ["demo", "--model", "gpt2", "--layer", "1", "--tokens", "20000", "--k", "4"]
    done = subprocess.run(
        [sys.executable, "-c", command, *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    transcoder = SAE.load_from_disk(tmp_path / "output" / "demo-gpt2-layer-1")
    assert type(transcoder) is JumpReLUTranscoder
    assert transcoder.cfg.metadata.model_name == "gpt2"
    assert transcoder.cfg.metadata.hook_name == "blocks.1.ln2.hook_normalized"
