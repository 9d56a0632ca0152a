"""The messages that the troubleshooting guide quotes are those that its symptoms give."""

from __future__ import annotations

import re
from collections.abc import Callable

import datasets
import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.cli.output import message as message_of
from tests.docs.pages import ROOT, code_blocks
from tests.helpers import run_steps, runner_config, trainer_for, transcoder_config

QUOTED = code_blocks(ROOT / "docs" / "troubleshooting.md", "text")


@pytest.fixture(scope="module")
def folded() -> HookedTransformer:
    return tiny.load_hooked_transformer(fold_ln=True)


def _quote_of(message: str) -> str:
    """The quotation that fits a message; where it says `…`, anything goes."""
    plain = " ".join(message.split())
    for quoted in QUOTED:
        parts = " ".join(quoted.split()).split("…")
        if re.search(".*".join(map(re.escape, parts)), plain):
            return quoted
    pytest.fail(f"the guide does not quote: {plain}")


def _message(call: Callable[[], object], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def _train(model: HookedTransformer, tokens: datasets.Dataset, **settings: object) -> None:
    sae = {key: settings.pop(key) for key in ("hook_name_out", "d_in") if key in settings}
    cfg = runner_config(transcoder_config(**sae), **settings)
    LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=tokens).run()


def test_every_message_that_is_quoted_is_what_the_symptom_says(
    tiny_model: HookedTransformer,
    folded: HookedTransformer,
    token_dataset: datasets.Dataset,
) -> None:
    sae = sm.inference_model(
        sm.MatryoshkaTrainingSAE(
            sm.MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[64])
        )
    )
    sae.cfg.metadata.hook_name = "blocks.2.ln2.hook_normalized"
    sae.cfg.metadata.input_frame = "normalized"
    tokens = torch.tensor(token_dataset[:4]["input_ids"])

    batches = [torch.randn(32, 256) for _ in range(2)]
    batches[1][3, 5] = torch.nan
    transcoder = sm.MatryoshkaTrainingTranscoder(transcoder_config(input_gain="none"))
    trainer = trainer_for(transcoder, batches)

    messages = [
        _message(lambda: sm.evaluate(sae, folded, tokens, n_tokens=64, n_ce_tokens=0)),
        _message(lambda: _train(folded, token_dataset)),
        _message(lambda: run_steps(trainer, batches), sm.NonFiniteActivationsError),
        _message(lambda: _train(tiny_model, token_dataset, device="mps")),
        _message(lambda: _train(tiny_model, token_dataset.select(range(2)))),
        _message(lambda: _train(tiny_model, token_dataset, hook_name="blocks.2.ln2.hook_normalised")),
        _message(lambda: _train(tiny_model, token_dataset, d_in=64)),
        message_of(OSError("We couldn't connect to 'https://huggingface.co' to load the files")),
    ]
    assert {_quote_of(message) for message in messages} == set(QUOTED)
