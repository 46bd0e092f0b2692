"""Command-line options made from the fields of a pydantic model."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from medusa_export.cli.fields import options_from, parse
from medusa_runtime.options import GenerationOptions


class Model(BaseModel):
    fast: bool | None = Field(None, description="whether it hurries; none for what was tuned")
    own_way: bool = Field(False, description="goes its own way")


@click.command()
@options_from(Model)
def command(**values: Any) -> None:
    click.echo(repr(parse(Model, values)))


@pytest.mark.parametrize(
    ("words", "fast", "own_way"),
    [
        ([], None, False),
        (["--fast"], True, False),
        (["--no-fast"], False, False),
        (["--fast", "--no-fast"], False, False),  # the last one counts
        (["--own-way"], None, True),
    ],
)
def test_a_flag_says_yes_and_no_where_no_word_means_neither(words, fast, own_way) -> None:
    assert CliRunner().invoke(command, words).stdout.strip() == repr(Model(fast=fast, own_way=own_way))


def test_a_flag_that_is_off_has_no_opposite() -> None:
    result = CliRunner().invoke(command, ["--no-own-way"])
    assert result.exit_code == 2
    assert "--fast / --no-fast" in CliRunner().invoke(command, ["--help"]).stdout


def test_generate_has_prompt_lookup_both_ways() -> None:
    from medusa_export.cli.generate import command as generate

    [option] = [option for option in generate.params if option.name == "prompt_lookup"]
    assert (option.opts, option.secondary_opts, option.default) == (["--prompt-lookup"], ["--no-prompt-lookup"], None)
    assert GenerationOptions().prompt_lookup is None
