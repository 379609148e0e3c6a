"""JSON and YAML that somebody else wrote, as plain values: no classes, no cycles, sizes that the text has.

What is refused is a ValueError that says why; whoever reads a file adds which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from fisherviz.support.errors import refusing

LONGEST = 2**19
"""Characters of a YAML text; its parser is slow."""
DEEPEST = 50
"""Lists and mappings one inside the other."""
LARGEST = 2**64
"""Of whole numbers."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, with numbers such as 1e-4, which it takes for text, and without keys that come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's.

        Args:
            node: of the mapping.
            deep: whether its values are made at once.
        """
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} comes twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """As PyYAML's.

        Args:
            node: of the number.
        """
        found = super().construct_yaml_int(node)
        if abs(found) > LARGEST:
            raise yaml.constructor.ConstructorError(None, None, "a number is beyond 64 bits", node.start_mark)
        return found


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def from_yaml(text: str) -> Any:
    """A YAML value; 1e-4 is a number, as everybody expects.

    Args:
        text: one document.

    Raises:
        ValueError: it is no YAML, names classes, repeats values by aliases or keys, or is deeper or larger than a
            person writes.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, more than {LONGEST:,}")
    with refusing():
        try:
            _check_form(text)
            return yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def _check_form(text: str) -> None:
    """What makes much of a short text is seen by the events of the parser, before it follows values by recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it repeats a value by the alias *{event.anchor}; write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"its values are more than {DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def from_json(text: str | bytes) -> Any:
    """A JSON value.

    Args:
        text: all of it.

    Raises:
        ValueError: it is no JSON, has a number that is none or a key twice, or is deeper than Python follows.
    """
    with refusing():
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key of it comes twice")
    return found
