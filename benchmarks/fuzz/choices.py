"""Decisions drawn from bytes, so that a fuzzer can steer them and a test can repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Reads bytes from the front; past their end every choice is the first one.

    Args:
        data: What the fuzzer makes up.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def bytes(self, n: int) -> bytes:
        """The next n bytes, fewer at the end."""
        taken = self.data[self.position : self.position + n]
        self.position += n
        return taken

    def integer(self, low: int, high: int) -> int:
        """A number in low .. high."""
        n_bytes = max(1, ((high - low).bit_length() + 7) // 8)
        return low + int.from_bytes(self.bytes(n_bytes), "little") % (high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.integer(0, len(options) - 1)]

    def chance(self, one_in: int) -> bool:
        """True once in that many times; False past the end."""
        return self.integer(0, one_in - 1) == one_in - 1
