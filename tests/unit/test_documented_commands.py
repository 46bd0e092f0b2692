"""The documentation's commands are where tests find them, and marks say why a test cannot run one.

tests/e2e/test_tutorial.py and tests/integration/test_documented_commands.py run every command that has no mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from medusa_export.cli import COMMANDS, main
from tests.support.documents import KINDS, PAGES, ROOT, Mark, blocks, commands

WORDS = r"(?:medusa-export|\$|pip|python|make|curl|serve) "
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PAGE = """A page.

<!-- not-run network "pip": an index -->
```console
$ pip install x
$ medusa-export doctor  # all
yes
no
$ curl x \\
    -d y
```
<!-- not-run gpu: a chip -->
```console
$ medusa-export serve x
```
"""
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def test_what_is_a_command_and_what_is_marked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    told = [(command.line, command.text, command.printed, command.mark) for command in commands(page)]
    pip, chip = Mark("network", "pip", "an index"), Mark("gpu", "", "a chip")
    assert told == [
        (5, "pip install x", (), pip),
        (6, "medusa-export doctor  # all", ("yes", "no"), None),
        (9, "curl x -d y", (), None),
        (14, "medusa-export serve x", (), chip),
    ]


@every_page
def test_a_mark_has_a_kind_and_is_about_a_command(page) -> None:
    found = [(block, mark) for block in blocks(page) for mark in block.marks]
    assert [mark.kind for _, mark in found if mark.kind not in KINDS] == []
    assert [mark for block, mark in found if not any(command.mark == mark for command in block.commands())] == []
    assert len(re.findall(r"^\s*<!-- not-run", page.read_text(encoding="utf-8"), re.MULTILINE)) == len(found)  # none elsewhere


@every_page
def test_commands_are_in_blocks_that_say_so(page) -> None:
    hidden = [
        f"{page.name}:{block.line}"
        for block in blocks(page)
        if block.language in {"", "bash", "sh", "shell", "text"} and re.search(rf"^{WORDS}", block.text, re.MULTILINE)
    ]
    assert hidden == []


@every_page
def test_the_commands_in_the_text_exist(page) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    told = re.findall(r"`medusa-export ([^`]+)`", text)
    assert [f"{page.name}: {text}" for text in told if not exists(text.split())] == []


def exists(words: list[str]) -> bool:
    """Whether there is such a command, with all the options named. Words in capitals and `…` stand for others."""
    if not words or words[0] not in COMMANDS:
        return not words or bool(re.fullmatch(r"-.*|…|COMMAND|[a-z]+,.*", words[0]))
    command: click.Command | None = main.get_command(click.Context(main), words[0])
    if isinstance(command, click.Group) and len(words) > 1 and words[1] in command.commands:
        command = command.commands[words[1]]
    known = set(options(command))
    return {word.partition("=")[0].strip("[]") for word in words if re.match(r"\[?--\w", word)} <= known


def options(command: click.Command | None) -> Iterator[str]:
    """The options of a command, and of those below it."""
    assert command is not None
    yield "--help"
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from options(below)
