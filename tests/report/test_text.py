from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from saelens_matryoshka import tiny
from saelens_matryoshka.report.text import TokenText

HARD = "def f(x):\n\treturn 'é — 🙂 漢字' + \"</script>\" # \\xe2 Ġ ▁\r\n\x00"


def test_the_bytes_of_byte_level_tokens_are_those_of_the_text() -> None:
    tokenizer = tiny.load_tokenizer()
    text = TokenText(tokenizer)
    tokens = tokenizer(HARD)["input_ids"]
    assert b"".join(map(text.bytes_of, tokens)) == HARD.encode()
    assert text.text_of(tokens) == HARD
    parts = tokenizer("🙂")["input_ids"]
    assert len(parts) > 1, "the case in point: a character of several tokens"
    assert "".join(map(text.string_of, parts)) == r"\xf0\x9f\x99\x82"


def test_special_and_missing_tokens_have_a_text() -> None:
    text = TokenText(tiny.load_tokenizer())
    assert text.string_of(2) == "<bos>"
    assert text.string_of(10**6) == "<1000000>"
    assert TokenText(None).string_of(5) == "<5>"


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Gemma's and Llama's: ▁ for a space, and bytes where a character has no token."""
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "Ġ": 5, "▁▁": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_sentencepiece_tokens_keep_their_spaces_and_bytes(sentencepiece: PreTrainedTokenizerFast) -> None:
    text = TokenText(sentencepiece)
    assert text.string_of(1) == " the"
    assert text.text_of([2, 3, 4]) == "€"
    assert text.string_of(5) == "Ġ", "a letter, not byte-level BPE's space"
    assert text.string_of(6) == "  "
