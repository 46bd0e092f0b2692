"""YAML as recipes are written in: plain values as YAML 1.2 reads them, and every key once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from medusa_runtime.errors import OptionError, first_line


class _Loader(yaml.SafeLoader):
    """PyYAML knows YAML 1.1, in which `no` is false and `1e-3` a text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load(text: str, where: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        where: what it is called in errors.

    Raises:
        OptionError: it is no YAML; the message gives the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - made from the safe one
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise OptionError(f"{where}: {line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise OptionError(f"{where} is no YAML: {first_line(error)}") from error
