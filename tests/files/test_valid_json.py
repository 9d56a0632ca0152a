from __future__ import annotations

import json
from typing import Any

import pytest

from saelens_matryoshka.files.valid_json import dumps

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NAN, None),
        ({"a": INF, "b": [1.5, -INF, (NAN, 2)]}, {"a": None, "b": [1.5, None, [None, 2]]}),
        ({"a": [0.1, 1e300, True, None, "NaN"]}, {"a": [0.1, 1e300, True, None, "NaN"]}),
    ],
)
def test_what_json_cannot_hold_is_null_and_all_else_as_it_was(value: Any, expected: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(dumps(value, indent=1), parse_constant=refuse) == expected


def test_options_are_those_of_the_library() -> None:
    assert dumps({"é": NAN}, ensure_ascii=False) == '{"é": null}'
    with pytest.raises(TypeError, match="not JSON serializable"):
        dumps({"a": {1}, "b": NAN})
