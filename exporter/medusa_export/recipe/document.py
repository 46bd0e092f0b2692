"""The YAML that recipes are written in: plain values are read as in YAML 1.2, and a repeated key is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from medusa_runtime.errors import OptionError, first_line


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, in which `no` is false and `1e-3` is a string. This loader reads values as YAML 1.2 does."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is given twice", key.start_mark)
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
        where: the document's name in errors.

    Raises:
        OptionError: the text is not YAML; the message gives the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise OptionError(f"{where}: {line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise OptionError(f"{where} is not valid YAML: {first_line(error)}") from error
