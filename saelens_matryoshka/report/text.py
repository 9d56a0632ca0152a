"""What single tokens look like as text.

Tokens are not characters: a byte-level token may be part of one. So a token is first of all its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Tokens of one tokenizer as bytes and as strings.

    Args:
        tokenizer: Of transformers. None: tokens are shown as their numbers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._added = {} if tokenizer is None else {i: s for s, i in tokenizer.get_added_vocab().items()}
        self._characters = _byte_characters() if _is_byte_level(tokenizer) else None

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes, which need not be whole characters."""
        if token not in self._bytes:
            self._bytes[token] = self._look_up(token)
        return self._bytes[token]

    def string_of(self, token: int) -> str:
        r"""The token as a string; what is no whole character as `\xe2`, as circuit-tracer has it."""
        return self.bytes_of(token).decode("utf-8", errors="backslashreplace")

    def text_of(self, tokens: Iterable[int]) -> str:
        """Several tokens as one text."""
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", errors="replace")

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        written = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(token)
        if written is None:  # the model's vocabulary is padded beyond the tokenizer's
            return f"<{token}>".encode()
        if self._characters is not None and all(c in self._characters for c in written):
            return bytes(self._characters[c] for c in written)
        if match := _BYTE.fullmatch(written):
            return bytes([int(match[1], 16)])
        return written.replace("▁", " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str()).get("decoder")
    parts = [decoder, *(decoder or {}).get("decoders", [])]
    return any(part is not None and part.get("type") == "ByteLevel" for part in parts)


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes each byte: printable ones as they are, the others from 256."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
