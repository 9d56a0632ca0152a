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
