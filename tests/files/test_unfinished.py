"""What is kept of any work. Collections and evaluations that go on: tests of their own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from saelens_matryoshka.files import unfinished
from saelens_matryoshka.files.unfinished import Unfinished
from saelens_matryoshka.stopping import RunStopped


class Counting:
    """Adds up the tokens it has seen."""

    def __init__(self) -> None:
        self.n_seen = 0

    def state(self) -> dict[str, torch.Tensor]:
        return {"n": torch.tensor(self.n_seen)}


def _work(kept: Unfinished, n: int, *, stop: bool = False) -> None:
    work = Counting()
    with kept.kept() as look:
        for _ in range(n):
            work.n_seen += 1
            if stop and work.n_seen == n:
                signal.raise_signal(signal.SIGTERM)
            look(work)


def _stopped(kept: Unfinished, n: int) -> str:
    with pytest.raises(RunStopped) as end:
        _work(kept, n, stop=True)
    assert end.value.exit_code == 143
    return str(end.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "saelens_matryoshka"


def _in_cache(of: Any = "model", **settings: Any) -> Unfinished:
    return Unfinished.in_cache("eval", of, {"n_tokens": 10, **settings})


def _tokens(kept: Unfinished) -> int | None:
    state = kept.load()
    return None if state is None else int(state["n"])


def test_two_of_one_model_at_once_each_go_on(cache: Path) -> None:
    first, second, same = _in_cache(n_tokens=10), _in_cache(n_tokens=20), _in_cache(n_tokens=10)
    _stopped(first, 3)
    _stopped(second, 5)
    _stopped(same, 4)
    assert len(list(cache.iterdir())) == 2
    for n_tokens, expected in ((10, 4), (20, 5)):
        kept = _in_cache(n_tokens=n_tokens)
        assert f"Going on with {kept.path}, after {expected} tokens" in str(kept.found())
        assert _tokens(kept) == expected


def test_what_others_of_the_model_have_left_is_named_and_goes_with_the_first_that_ends(cache: Path) -> None:
    _stopped(_in_cache(), 3)
    _stopped(_in_cache(of="another"), 2)
    kept = _in_cache(n_tokens=20, weights=["b"])
    assert "is of other settings (n_tokens 10, not 20, other weights): starting anew" in str(kept.found())
    assert kept.load() is None
    _stopped(kept, 5)
    assert _tokens(_in_cache()) == 3, "nothing is lost before the end"
    kept.remove()
    assert [_tokens(_in_cache()), _tokens(_in_cache(of="another"))] == [None, 2]
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_written_before_it_is_due(cache: Path) -> None:
    _work(_in_cache(), 100)
    assert _in_cache().found() is None
    assert not cache.exists()


def test_a_place_that_cannot_be_written_is_told_and_does_not_end_the_work(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    cache.parent.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match=r"After 1 tokens, they cannot be kept in .*unfinished: "):
        _work(_in_cache(), 2)
    with pytest.warns(UserWarning, match="After 1 tokens"):
        said = _stopped(_in_cache(), 2)
    assert said.startswith("Stopped after 2 tokens, as asked; they cannot be kept in ")
    _in_cache().remove()


@pytest.mark.parametrize("content", [b"", b"{}", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 100])
def test_a_file_of_something_else_is_named_and_replaced(content: bytes, tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "numbers", {})
    kept.path.write_bytes(content)
    assert "cannot be read: starting anew" in str(kept.found())
    assert kept.load() is None
    _stopped(kept, 3)
    assert _tokens(Unfinished(tmp_path / "numbers", {})) == 3


def test_what_a_killed_process_left_goes_too_and_nothing_of_another_name(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "a[1]*", {})
    ours, other = (kept.path.with_name(f".{name}.unfinished.{'0' * 32}") for name in ("a[1]*", "a[1]b"))
    for path in (ours, other):
        path.touch()
    kept.remove()
    assert not ours.exists()
    assert other.exists()
