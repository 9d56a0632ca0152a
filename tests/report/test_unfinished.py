"""A collection that is ended and gone on with: its samples are those of one that was not, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE
from transformer_lens import HookedTransformer

from saelens_matryoshka.files import unfinished
from saelens_matryoshka.files.unfinished import Unfinished
from saelens_matryoshka.report import Samples
from saelens_matryoshka.stopping import RunStopped
from tests.report.conftest import CONTEXT, collected

BATCH = 7


def _equal(found: Samples, expected: Samples) -> bool:
    ours, theirs = vars(found), vars(expected)
    for name in ("top", "intervals"):
        ours, theirs = ours | vars(ours[name]), theirs | vars(theirs[name])
        assert ours.pop(name) is not theirs.pop(name)
    return all(
        torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


class Interrupted(Exception):
    pass


class Ended:
    """Ends a collection after a batch: by a signal, or as a process that is killed ends."""

    def __init__(self, batch: int, number: int | None = None) -> None:
        self.left, self.number = batch, number

    def __call__(self, n_tokens: int) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0 and self.number is not None:
            signal.raise_signal(self.number)
        elif self.left == 0:
            raise Interrupted


@pytest.fixture
def whole(sae: JumpReLUSAE, tiny_model: HookedTransformer, prompts: torch.Tensor) -> Samples:
    return collected(sae, tiny_model, prompts, batch_size_prompts=BATCH)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_collection_goes_on_as_if_it_had_not_been(
    number: int,
    whole: Samples,
    sae: JumpReLUSAE,
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
) -> None:
    handler = signal.getsignal(number)
    for n_batches in (1, 3, 4, 1):  # of 9 together
        kept = Unfinished(tmp_path / "samples", {"seed": 0})
        with pytest.raises(
            RunStopped, match=r"tokens, as asked; they are kept in .*samples\.unfinished"
        ) as end:
            collected(
                sae,
                tiny_model,
                prompts,
                batch_size_prompts=BATCH,
                unfinished=kept,
                on_progress=Ended(n_batches, number),
            )
        assert end.value.exit_code == 128 + number
        assert signal.getsignal(number) is handler
    seen: list[int] = []
    kept = Unfinished(tmp_path / "samples", {"seed": 0})
    assert f"after {60 * CONTEXT:,} tokens" in str(kept.found())
    found = collected(
        sae, tiny_model, prompts, batch_size_prompts=BATCH, unfinished=kept, on_progress=seen.append
    )
    assert not seen, "all batches were there"
    assert _equal(found, whole)
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_a_killed_collection_goes_on_from_what_was_saved_last(
    whole: Samples,
    sae: JumpReLUSAE,
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    kept = Unfinished(tmp_path / "samples", {})
    settings: dict[str, Any] = {"batch_size_prompts": BATCH, "unfinished": kept}
    with pytest.raises(Interrupted):
        collected(sae, tiny_model, prompts, on_progress=Ended(5), **settings)
    (tmp_path / ".samples.unfinished.0123").write_bytes(b"half")  # it was killed while it wrote the next
    seen: list[int] = []
    found = collected(sae, tiny_model, prompts, on_progress=seen.append, **settings)
    assert seen[0] == 5 * BATCH * CONTEXT
    assert _equal(found, whole)
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_gone_on_with_is_named_and_replaced(
    whole: Samples,
    sae: JumpReLUSAE,
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
) -> None:
    def stopped(kept: Unfinished, text: torch.Tensor = prompts) -> None:
        with pytest.raises(RunStopped):
            collected(
                sae,
                tiny_model,
                text,
                batch_size_prompts=BATCH,
                unfinished=kept,
                on_progress=Ended(2, signal.SIGINT),
            )

    ours, others = (Unfinished(tmp_path / "samples", {"seed": seed, "weights": "a"}) for seed in (0, 1))
    assert ours.found() is None
    stopped(others)
    assert "is of other settings (seed 1, not 0): starting anew" in str(ours.found())
    assert ours.load() is None
    stopped(ours)
    assert ours.load() is not None
    assert others.load() is None

    ours.path.write_bytes(ours.path.read_bytes()[:1000])
    assert "cannot be read: starting anew" in str(ours.found())
    stopped(ours, prompts.flip(0))
    with pytest.warns(UserWarning, match="The text is not what it was"):
        found = collected(sae, tiny_model, prompts, batch_size_prompts=BATCH, unfinished=ours)
    assert _equal(found, whole)
