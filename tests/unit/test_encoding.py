"""Text files are UTF-8, whatever the locale says: with Latin-1, DeepSeek's markers would become other tokens silently."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import run_cli

ROOT = Path(__file__).parents[2]
ROOMS = ("exporter", "runtime", "heads", "bench", "scripts", "examples")
MARKER = "<｜begin▁of▁sentence｜>"
ENDINGS = "one\r\ntwo\u2028three\n"


def forgotten(source: str) -> list[int]:
    """The lines of calls that read or write text and do not say in which encoding. Ruff's PLW1514 sees a quarter of them."""
    return [call.lineno for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call) and _is_forgotten(call)]


def _is_forgotten(call: ast.Call) -> bool:
    owner, name = (call.func.value, call.func.attr) if isinstance(call.func, ast.Attribute) else (None, None)
    name = call.func.id if isinstance(call.func, ast.Name) else name
    owner_name = owner.id if isinstance(owner, ast.Name) else None
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or (owner_name, name) == ("os", "open"):
        return False
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name in ("open", "fdopen", "TextIOWrapper", "NamedTemporaryFile", "FileHandler"):
        is_method = owner is not None and owner_name not in ("os", "io")
        place = 0 if is_method or name == "NamedTemporaryFile" else 1
        mode = keywords.get("mode", call.args[place] if len(call.args) > place else None)
        if mode is None:
            return name not in ("NamedTemporaryFile",)
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value and len(mode.value) < 4
    return False


def programs() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()",
        "path.write_text(text)",
        "path.read_text(errors='replace')",
        "open(path)",
        "path.open('a')",
        "os.fdopen(1, 'w')",
        "subprocess.run(command, text=True)",
    ],
)
def test_a_call_without_an_encoding_is_found(call: str) -> None:
    assert forgotten(call) == [1]


@pytest.mark.parametrize(
    "call", ["path.read_text(encoding='utf-8')", "path.open('rb')", "open(path, mode='wb')", "os.open(path, os.O_RDONLY)"]
)
def test_bytes_and_named_encodings_are_fine(call: str) -> None:
    assert forgotten(call) == []


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = {str(path.relative_to(ROOT)): forgotten(path.read_text(encoding="utf-8")) for path in programs()}
    found.pop("exporter/medusa_export/fetch.py", None)  # opens a member of an archive, which is bytes
    assert len(found) > 200
    assert {path: lines for path, lines in found.items() if lines} == {}
