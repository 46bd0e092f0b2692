"""Each message that docs/troubleshooting.md explains is one that the program has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest

from tests.support.documents import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
HOLE = "…"  # what differs


@cache
def sources() -> list[str]:
    """Every text in the code, with `…` for what is put into it."""
    rooms = ("runtime", "exporter", "heads", "serving")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [text for tree in trees for node in ast.walk(tree) for text in told(node)]


def told(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_says_so(message: str) -> None:
    fixed = [part for part in re.split(HOLE, message) if part]
    assert sum(map(len, fixed)) >= 12, "too short to tell it from others"
    pattern = re.compile(".*".join(re.escape(part) for part in fixed), re.DOTALL)
    assert any(pattern.search(text) for text in sources()), message


def test_each_message_is_told_once_and_has_an_answer() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) > 50
    lines = PAGE.splitlines()
    headings = [number for number, line in enumerate(lines) if line.startswith("#")] + [len(lines)]
    empty = [lines[here] for here, there in pairwise(headings) if lines[here].startswith("###") and there - here < 4]
    assert empty == []


def test_the_exit_codes_are_those_of_the_command() -> None:
    from medusa_export.cli import main

    codes = set(re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE))
    assert codes == set(re.findall(r"\b(\d+) ", (main.help or "").partition("Exit codes:")[2].replace("\n", " ")))
