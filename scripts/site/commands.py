"""A hook of MkDocs: the reference of the command line, made from the commands themselves as `--help` shows them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click
from mkdocs.structure.pages import Page

from medusa_export.cli import main

PAGE, PLACE, PROGRAM = "cli.md", "<!-- the commands -->", "medusa-export"


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put the commands where the page has a place for them."""
    if page.file.src_uri != PAGE:
        return markdown
    if PLACE not in markdown:
        raise click.ClickException(f"{PAGE} has no {PLACE}")
    context = click.Context(main, info_name=PROGRAM)
    return markdown.replace(PLACE, "\n".join(line for command in below(context) for line in described(*command)))


def below(context: click.Context, level: int = 2) -> Iterator[tuple[click.Context, int]]:
    """The commands below one, each with its context and the level of its heading."""
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None and not command.hidden:
            own = click.Context(command, parent=context, info_name=name)
            yield own, level
            if isinstance(command, click.Group):
                yield from below(own, level + 1)


def described(context: click.Context, level: int) -> Iterator[str]:
    """A command's section: what it does, how it is called, its options."""
    command = context.command
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"{'#' * level} {context.command_path.removeprefix(f'{PROGRAM} ')}\n"
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield inspect.cleandoc(command.help or "").replace("\b\n", "") + "\n"
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    if len(records) > 1:  # more than --help
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{cell(option)}` | {cell(meaning, escaped=True)} |" for option, meaning in records)
        yield ""


def cell(text: str, *, escaped: bool = False) -> str:
    """A text for a cell of a table, in which nothing is markup if it is escaped."""
    text = " ".join(text.split())
    if escaped:
        return "".join(f"&#{ord(letter)};" if letter in "<>[]*_`|" else letter for letter in text)
    return text.replace("|", "\\|")
