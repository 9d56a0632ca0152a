from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from saelens_matryoshka.evaluation.comparison import Comparison
from saelens_matryoshka.evaluation.result import EvalResult, PrefixMetrics

PREFIX = PrefixMetrics(16, 0.1, 0.9, 0.95, 3.5, 2, [1, 2], 0.25, 3.1, 0.8, 0.7, 0.05)
RESULT = EvalResult([PREFIX], 500, 200, "in", "out", "raw", 4.0, 2.5, 5.5, 4.5)


def _changed(result: dict[str, Any], prefix: dict[str, Any]) -> EvalResult:
    return dataclasses.replace(RESULT, prefixes=[dataclasses.replace(PREFIX, **prefix)], **result)


@pytest.mark.parametrize(
    ("result", "prefix"),
    [
        ({}, {}),
        ({"ce_clean": math.nan}, {"fvu": math.nan, "l0": math.nan, "kl": math.nan, "ce": math.nan}),
        ({}, {"decoder_redundancy": None, "ce_recovered": None}),
        (
            {"n_ce_tokens": 0, "train_l0": None, "ce_clean": None, "ce_zero": None, "ce_mean": None},
            {"fvu": math.nan, "ce": None, "kl": None, "ce_recovered": None, "ce_recovered_mean": None},
        ),
    ],
)
def test_json_gives_the_result_back_and_never_has_nan(result: dict[str, Any], prefix: dict[str, Any]) -> None:
    given = _changed(result, prefix)
    text = given.to_json()
    assert "NaN" not in text
    assert repr(EvalResult.from_json(text)) == repr(given)  # NaN is equal to nothing
    assert json.loads(Comparison({"a": given}).to_json())["a"] == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"n_ce_tokens": 0}', '{"n_ce_tokens": 0, "prefixes": [3]}']
)
def test_text_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text is not what EvalResult.to_json gives: .+"):
        EvalResult.from_json(text)


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_shows_every_figure_whole(columns: int) -> None:
    console = Console(width=columns, file=io.StringIO())
    with console.capture() as shown:
        console.print(_changed({}, {"width": 1024, "ce_recovered_mean": -1.234, "n_dead": 512}).table())
    assert "1,024 0.100 0.950 3.5 50.0% 3.100 80.0% -123.4% 0.050" in " ".join(shown.get().split())
    assert "…" not in shown.get()


def test_models_may_have_numbers_for_names() -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as shown:
        console.print(Comparison({32: RESULT, 64: RESULT}).tables())  # type: ignore[dict-item]
    text = shown.get()
    assert "32 reads in (raw)" in text
    assert "64 reads in (raw)" in text


@pytest.mark.parametrize(("n_ce_tokens", "said"), [(200, "; CE and KL on 200 of them"), (0, "")])
def test_a_comparison_without_cross_entropy_does_not_speak_of_it(n_ce_tokens: int, said: str) -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as shown:
        console.print(Comparison({"a": _changed({"n_ce_tokens": n_ce_tokens}, {})}).tables())
    assert shown.get().endswith(f"500 tokens for all{said}\n")
