"""Every command of the documentation is run by a test, or is marked with the reason why not."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from medusa_export.cli import COMMANDS, main
from tests.support.documents import KINDS, PAGES, PAGES_THAT_RUN, ROOT, TUTORIAL, blocks, commands

WORDS = r"(?:medusa-export|\$|pip|python|make|curl|serve) "
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@every_page
def test_a_command_is_run_or_marked(page) -> None:
    if page in {TUTORIAL, *PAGES_THAT_RUN}:
        return  # tests/e2e/test_tutorial.py and tests/integration/test_documented_commands.py run what is not marked
    assert [str(command) for command in commands(page) if command.mark is None] == []


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
