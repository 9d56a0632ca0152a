"""An evaluation that is ended and gone on with: its numbers are those of one that was not, to the bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.files import unfinished
from saelens_matryoshka.files.unfinished import Unfinished
from saelens_matryoshka.ops import Group
from saelens_matryoshka.stopping import RunStopped
from tests.report.conftest import CONTEXT, random_sae

BATCHES, CE_BATCHES, PROMPTS = 5, 3, 2
TOKENS = PROMPTS * CONTEXT
SETTINGS: dict[str, Any] = {
    "n_tokens": BATCHES * TOKENS,
    "n_ce_tokens": CE_BATCHES * TOKENS - 1,
    "batch_size_prompts": PROMPTS,
}


@pytest.fixture(scope="module")
def saes() -> dict[str, JumpReLUSAE]:
    return {"narrow": random_sae(96), "wide": random_sae(120)}


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    tokens = torch.randint(3, 4000, (PROMPTS * BATCHES, CONTEXT), generator=torch.Generator().manual_seed(1))
    tokens[::7, 11] = 1
    return tokens


class Interrupted(Exception):
    pass


class Ended:
    """Ends an evaluation after a batch: by a signal, or as a process that is killed ends."""

    def __init__(self, batch: int, number: int | None = None) -> None:
        self.left, self.number = batch, number

    def __call__(self, what: str, done: int, total: int) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0 and self.number is not None:
            signal.raise_signal(self.number)
        elif self.left == 0:
            raise Interrupted


def _evaluate(saes: dict[str, JumpReLUSAE], *args: Any, **settings: Any) -> Any:
    return sm.evaluate(saes["wide"], *args, **SETTINGS, **settings)


def _compare(saes: dict[str, JumpReLUSAE], *args: Any, **settings: Any) -> Any:
    return sm.compare(saes, *args, **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("function", "n_models", "number"),
    [(_evaluate, 1, signal.SIGINT), (_evaluate, 1, signal.SIGTERM), (_compare, 2, signal.SIGTERM)],
)
def test_a_stopped_evaluation_gives_the_numbers_of_one_that_was_not(
    function: Any,
    n_models: int,
    number: int,
    saes: dict[str, JumpReLUSAE],
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
) -> None:
    whole = function(saes, tiny_model, prompts)
    n_batches = n_models * (BATCHES + CE_BATCHES)
    for left in (1, 3, 2, n_batches - 6):  # in both passes, between them, and after the last batch
        kept = Unfinished(tmp_path / "numbers", {"a": 1})
        stop = Ended(left, number)
        with pytest.raises(
            RunStopped, match=r"tokens, as asked; they are kept in .*numbers\.unfinished"
        ) as end:
            function(saes, tiny_model, prompts, unfinished=kept, on_progress=stop)
        assert end.value.exit_code == 128 + number
        assert not stop.left
    seen: list[Any] = []
    kept = Unfinished(tmp_path / "numbers", {"a": 1})
    n_tokens = n_models * (BATCHES + CE_BATCHES) * TOKENS
    assert f"after {n_tokens:,} tokens" in str(kept.found())
    found = function(saes, tiny_model, prompts, unfinished=kept, on_progress=lambda *now: seen.append(now))
    assert not seen, "all batches were there"
    assert found == whole
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_a_killed_comparison_goes_on_from_what_was_saved_last(
    saes: dict[str, JumpReLUSAE],
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    whole = _compare(saes, tiny_model, prompts)
    kept = Unfinished(tmp_path / "numbers", {})
    with pytest.raises(Interrupted):  # in the second model
        _compare(saes, tiny_model, prompts, unfinished=kept, on_progress=Ended(BATCHES + CE_BATCHES + 3))
    seen: list[tuple[str, int, int]] = []
    found = _compare(saes, tiny_model, prompts, unfinished=kept, on_progress=lambda *now: seen.append(now))
    assert seen[0] == ("reconstruction", 3 * TOKENS, BATCHES * TOKENS)
    assert seen[-1] == ("cross-entropy", CE_BATCHES * TOKENS, CE_BATCHES * TOKENS)
    assert found == whole


@pytest.mark.parametrize("change", ["the tokens", "their number", "the batches"])
def test_another_text_begins_anew_and_says_so(
    change: str,
    saes: dict[str, JumpReLUSAE],
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
) -> None:
    kept = Unfinished(tmp_path / "numbers", {})
    with pytest.raises(RunStopped):
        _evaluate(saes, tiny_model, prompts, unfinished=kept, on_progress=Ended(4, signal.SIGINT))
    text = prompts.flip(0) if change == "the tokens" else prompts
    settings = {
        **SETTINGS,
        **({"n_tokens": 3 * CONTEXT} if change == "their number" else {}),
        **({"batch_size_prompts": 5} if change == "the batches" else {}),
    }
    whole = sm.evaluate(saes["wide"], tiny_model, text, **settings)
    with pytest.warns(UserWarning, match="The text is not what it was when the evaluation was ended"):
        found = sm.evaluate(saes["wide"], tiny_model, text, unfinished=kept, **settings)
    assert found == whole


def test_shards_of_several_processes_are_refused(
    saes: dict[str, JumpReLUSAE], tiny_model: HookedTransformer, prompts: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="unfinished: what each of several processes has is not kept"):
        _evaluate(saes, tiny_model, prompts, group=Group(), unfinished=Unfinished(tmp_path / "numbers", {}))
