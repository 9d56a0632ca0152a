"""The names of SAELens's settings, their types and defaults, and values read as those types.

A setting has the name of its flag on SAELens's command line: `training_tokens`, `d_sae`, `wandb_project`;
`sae.dtype` and `sae.device` where the runner has a setting of the same name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_matryoshka.plugin import ARCHITECTURES

OUR_CONFIGS: dict[str, Any] = {config.architecture(): config for _, config in ARCHITECTURES}

# Written by SAELens, deprecated, or parts of their own.
_NOT_SETTINGS = {"sae", "logger", "metadata", "hook_eval", "sae_lens_version", "sae_lens_training_version"}
_SIZES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


class Field(NamedTuple):
    """One setting."""

    owner: Literal["runner", "sae", "logger"]
    attribute: str
    hint: Any
    default: Any
    """`dataclasses.MISSING` where there is none"""


@dataclass(frozen=True)
class Given:
    """A value as it was given, and by whom."""

    value: Any
    origin: str
    """ "flag", "preset NAME", a file, ..."""

    def called(self, name: str) -> str:
        """How to name the setting in a message: a flag as a flag."""
        return f"--{name}" if self.origin == "flag" else f"{name} ({self.origin})"


def canonical(name: str) -> str:
    """The setting's name, from a name with dashes or with the part of the config it belongs to."""
    name = name.replace("-", "_")
    if name == "sae":  # what SAELens's parser calls it too
        return "architecture"
    owner, dot, attribute = name.partition(".")
    if dot and owner in ("sae", "logger", "cfg") and name not in ("sae.dtype", "sae.device"):
        return attribute.rpartition(".")[2]
    return name


@cache
def fields_of(architecture: str) -> dict[str, Field]:
    """Every setting of one of our architectures, by name."""
    runner = _fields("runner", LanguageModelSAERunnerConfig)
    found = {**runner, **_fields("logger", LoggingConfig)}
    for name, field in _fields("sae", OUR_CONFIGS[architecture]).items():
        found[f"sae.{name}" if name in runner else name] = field
    return found


def _fields(owner: Any, config: type) -> dict[str, Field]:
    hints = get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        if field.name in _NOT_SETTINGS or not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Field(owner, field.name, hints[field.name], default)
    return found


def require_our_architecture(given: Given) -> str:
    """The name of one of our architectures.

    Raises:
        ValueError: it is another's, or none.
    """
    name = given.value
    if name in OUR_CONFIGS:
        return name
    ours = ", ".join(OUR_CONFIGS)
    if name in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"{given.called('architecture')} {name!r} is SAELens's own: train it with "
            f"`python -m sae_lens.llm_sae_training_runner`. This command trains {ours}."
        )
    raise ValueError(
        f"{given.called('architecture')} {name!r} is not known{did_you_mean(str(name), OUR_CONFIGS)} "
        f"This command trains {ours}."
    )


def unknown(
    name: str, given: Given, architecture: str, ours: Iterable[str], flags: Collection[str]
) -> ValueError:
    """The error for a name that is no setting of an architecture.

    Args:
        name: As it was given.
        given: Where.
        architecture: Whose settings are known.
        ours: Settings beside SAELens's.
        flags: Of `train`, which are no settings.
    """
    if name in flags:
        flag = f"--{name.replace('_', '-')}"
        return ValueError(f"{given.called(name)} is no setting of a run: `train` has it as {flag}.")
    for other in OUR_CONFIGS:
        if name in fields_of(other):
            return ValueError(f"{given.called(name)} is a setting of {other}, not of {architecture}.")
    known = [*fields_of(architecture), *ours, *flags]
    return ValueError(
        f"{given.called(name)} is not a setting{did_you_mean(name, known)} `train --help-all` lists them all."
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The most similar of the known names as the end of a sentence, or its full stop."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


# ---- values


def read_value(name: str, given: Given, hint: Any) -> Any:
    """A value from YAML or from a command line as its setting's type.

    Args:
        name: Of the setting, for the message.
        given: From a command line a string, or a list of them, or True for a flag without a value.
        hint: The setting's type.

    Raises:
        ValueError: it is of another type.
    """
    value = given.value
    accepted = [get_origin(part) or part for part in _parts(hint)]
    lists = list in accepted or tuple in accepted
    if isinstance(value, str) and value.lower() in ("none", "null") and types.NoneType in accepted:
        return None
    if isinstance(value, str) and (dict in accepted or (lists and value.startswith("["))):
        value = _from_json(value)
    elif isinstance(value, str) and lists and (bool not in accepted or "," in value):
        value = value.split(",")
    elif isinstance(value, str) and int in accepted and bool not in accepted:
        value = whole_number(value)
    try:
        if isinstance(value, bool) and bool not in accepted:
            raise ValueError
        return TypeAdapter(hint).validate_python(value)
    except (ValidationError, ValueError):
        bare = given.value is True and given.origin == "flag"
        shown = "without a value" if bare else repr(given.value)
        quotes = ", in quotes" if str in accepted and given.origin != "flag" else ""
        raise ValueError(f"{given.called(name)} {shown}: expected {in_words(hint)}{quotes}.") from None


def in_words(hint: Any) -> str:
    """A type as a user would say it."""
    said = []
    for part in _parts(hint):
        origin, args = get_origin(part), get_args(part)
        if part is types.NoneType:
            said.append("none")
        elif origin is Literal:
            said += [str(choice) for choice in args]
        elif origin in (list, tuple):
            inner = in_words(args[0]).removeprefix("a ").replace("number", "numbers")
            said.append(f"a list of {inner}")
        else:
            said.append(_WORDS.get(origin or part, str(part)))
    return " or ".join(said)


def _parts(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def whole_number(text: str) -> int | str:
    """250_000, 1e8, 500k, 2M or 1B as a whole number; what is none of them as it is."""
    size = _SIZES.get(text[-1:].lower())
    try:
        number = float(text if size is None else text[:-1]) * (size or 1)
    except ValueError:
        return text
    # what has a point and no unit, 16.0, is meant as another kind of number
    return int(number) if number.is_integer() and (size or "." not in text) else text


def short_number(number: float) -> str:
    """Three digits of a number, such as 250k, 2M or 1.5B."""
    number = float(f"{number:.3g}")  # before the unit is chosen: 999,999 is 1M
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
