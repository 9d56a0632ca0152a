"""YAML of plain values, from files that anybody may have written."""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 16
"""YAML is read a thousand times more slowly than JSON"""


class PlainLoader(yaml.SafeLoader):
    """Without aliases, by which a few lines stand for more than any memory holds once they are printed."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)


def plain_values(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: it is no YAML of plain values; the message is why, on one line.
    """
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
