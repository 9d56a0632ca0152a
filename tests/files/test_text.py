from __future__ import annotations

from pathlib import Path

import pytest

from saelens_matryoshka.files.text import open_text


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["a[1]*.txt", "[b].txt", "größe #1%20.txt"])
def test_the_file_of_a_name_is_read_and_not_those_that_it_matches_as_a_pattern(
    name: str, streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("the text")
    for other in ("a1b.txt", "b.txt"):
        (tmp_path / other).write_text("another")
    text = open_text(str(tmp_path / name), streaming=streaming)
    assert [row["text"] for row in text] == ["the text"]
