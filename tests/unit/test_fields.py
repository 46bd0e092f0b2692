"""Command-line options made from the fields of a pydantic model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass

from medusa_export.cli.fields import options_from, parse
from medusa_export.command_options.flag import OUTPUT, Flag
from medusa_runtime.errors import OptionError
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


@dataclass(frozen=True)
class Options:
    place: Path
    heads: Annotated[Path | None, Field(description="the heads"), Flag(default="those in PLACE")]
    output: Annotated[Path, Field(description="where to"), OUTPUT]
    precision: Annotated[Literal["low", "high"], Field(description="low: fast. high: exact"), Flag(("--dtype",))] = "low"
    bits: Annotated[Literal[8, 16] | None, Field(description="bits"), Flag(default="as it comes")] = None
    targets: Annotated[tuple[str, ...], Field(description="what for"), Flag(("--target",))] = ()
    log: Annotated[Path | None, Field(description="a log"), Flag(metavar="FILE", is_file=True)] = None
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="part of it all")] = 0.5


@click.command()
@click.argument("place", type=click.Path(path_type=Path))
@options_from(Options, leave_out={"place"})
def with_flags(**values: Any) -> None:
    click.echo(repr(parse(Options, values)))


def test_flags_have_the_names_types_and_defaults_of_fields() -> None:
    given = "here -o there --dtype high --bits 16 --target a --target b --log l --share 0.25"
    made = Options(Path("here"), None, Path("there"), "high", 16, ("a", "b"), Path("l"), 0.25)
    assert CliRunner().invoke(with_flags, given.split()).stdout.strip() == repr(made)
    little = CliRunner().invoke(with_flags, ["here", "--output", "there"])
    assert little.stdout.strip() == repr(Options(Path("here"), None, Path("there")))
    told = " ".join(CliRunner().invoke(with_flags, ["--help"], terminal_width=200).stdout.split())
    for part in (
        "--heads PATH The heads. [default: those in PLACE]",
        "-o, --output PATH Where to. [required]",
        "--dtype [low|high] low: fast. high: exact. [default: low]",
        "--bits [8|16] Bits. [default: as it comes]",
        "--target TEXT What for. May be repeated.",
        "--log FILE A log.",
        "--share FLOAT RANGE Part of it all. [default: 0.5] [0<x<=1]",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("here", "Missing option '-o' / '--output'."),
        ("here -o there --bits 4", "'4' is not one of '8', '16'."),
        ("here -o there --share 0", "0.0 is not in the range 0<x<=1."),
        ("here -o there --log .", "File '.' is a directory."),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(words: str, message: str) -> None:
    result = CliRunner().invoke(with_flags, words.split())
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_value_that_no_flag_can_refuse_is_told_with_the_flag() -> None:
    with pytest.raises(OptionError, match=r"^--share is nan: input should be a finite number$"):
        parse(Options, {"place": "here", "heads": None, "output": "there", "share": float("nan")})
    with pytest.raises(OptionError, match=r"^--dtype is 'middle': input should be 'low' or 'high'$"):
        parse(Options, {"place": "here", "heads": None, "output": "there", "precision": "middle"})
