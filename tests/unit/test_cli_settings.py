"""Options from files and variables, their order, and `--print-config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from pydantic import Field
from pydantic.dataclasses import dataclass

from medusa_export.cli import main
from medusa_export.cli.commands import VARIABLES, Command, Group
from medusa_export.cli.fields import options_from, parse
from medusa_export.command_options.flag import Flag
from medusa_runtime.errors import OptionError


@dataclass(frozen=True)
class Options:
    place: Path
    precision: Annotated[Literal["low", "high"], Field(description="how exact"), Flag(("--dtype",))] = "low"
    targets: Annotated[tuple[str, ...], Field(description="what for"), Flag(("--target",))] = ()
    nodes: Annotated[int, Field(ge=1, le=64, description="nodes")] = 16
    limit: Annotated[int | None, Field(description="at most this many"), Flag(default="all")] = None
    rotate: Annotated[bool | None, Field(description="whether it turns")] = None
    force: Annotated[bool, Field(description="replace")] = False


@click.group(cls=Group, context_settings={"auto_envvar_prefix": VARIABLES})
def program() -> None:
    pass


@program.command("make")
@click.argument("place", type=click.Path(path_type=Path))
@options_from(Options, leave_out={"place"})
@click.option("--sizes", default="1,2", help="Sizes.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Change a value.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def make(sizes: str, overrides: tuple[str, ...], as_json: bool, **values: Any) -> None:
    click.echo(repr((parse(Options, values), sizes, overrides, as_json)))


def run(*words: object, **variables: str) -> Result:
    return CliRunner().invoke(
        program, ["make", *map(str, words)], env={f"{VARIABLES}_{name}": v for name, v in variables.items()}
    )


def told(*others: Any, **fields: Any) -> str:
    given = (*others, *("1,2", (), False)[len(others) :])
    return repr((Options(**({"place": Path("here")} | fields)), *given)) + "\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return path

    return write


def test_the_command_line_comes_before_variables_before_the_file_before_defaults(write) -> None:
    file = write("nodes: 3\n")
    assert run("here").stdout == told(nodes=16)
    assert run("here", "--config", file).stdout == told(nodes=3)
    assert run("here", "--config", file, MAKE_NODES="4").stdout == told(nodes=4)
    assert run("here", "--config", file, "--nodes", 5, MAKE_NODES="4").stdout == told(nodes=5)
    assert run("here", MAKE_CONFIG=str(file)).stdout == told(nodes=3)


def test_a_file_holds_every_kind_of_option(write) -> None:
    text = "place: there\ndtype: high\ntarget: [a, 1.5]\nlimit: ~\nrotate: false\nforce: true\nsizes: [4, 8]\n"
    text += "set: {x: 1}\njson: true\n"
    options = Options(Path("there"), "high", ("a", "1.5"), 16, None, False, True)
    assert run("--config", write(text)).stdout == repr((options, "4,8", ("x=1",), True)) + "\n"
    by_field = "place: there\nprecision: high\ntargets: a\n"
    assert run("--config", write(by_field)).stdout == told(place=Path("there"), precision="high", targets=("a",))
    assert run("here", "--config", write("")).stdout == told()


def test_a_variable_holds_every_kind_of_option() -> None:
    variables = {"PRECISION": "high", "TARGETS": "a b", "ROTATE": "no", "FORCE": "1", "SIZES": "4", "JSON": "true"}
    result = run("here", **{f"MAKE_{name}": value for name, value in variables.items()})
    assert result.stdout == told("4", (), True, precision="high", targets=("a", "b"), rotate=False, force=True)
    assert run("here", MAKE_DTYPE="high", MAKE_TARGET="a").stdout == told(precision="high", targets=("a",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 3", "`make` has no option 'node'; did you mean nodes?"),
        ("zzz: 3", "`make` has no option 'zzz'; see: medusa-export make --help"),
        ("config: x", "`make` has no option 'config'"),
        ("dtype: low\nprecision: high", "precision is given twice, once under another name; leave one out"),
        ("nodes: 3\nnodes: 4", "the key nodes is given twice"),
        ("[1, 2]", "it must hold options as NAME: VALUE, not list alone"),
        ("nodes: [[1]]", "nodes holds a list or an object within a list; give plain values"),
        ("nodes: true", "nodes is true, but it is no switch; give a value, or leave it out"),
        ("force: 1", "force is 1; it must be true or false"),
        ("a: [", "line 1: "),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(write, text: str, message: str) -> None:
    file = write(text)
    with pytest.raises(OptionError) as caught:
        CliRunner().invoke(program, ["make", "here", "--config", str(file)], catch_exceptions=False)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff")
    for name in ("missing", "x"):
        with pytest.raises(OptionError, match=f"--config {tmp_path / name} cannot be read: "):
            CliRunner().invoke(program, ["make", "here", "--config", str(tmp_path / name)], catch_exceptions=False)


def test_a_bad_value_names_the_file_or_the_variable(write) -> None:
    file = write("nodes: 99\n")
    assert f"'--nodes': 99 is not in the range 1<=x<=64 (from {file})." in run("here", "--config", file).stderr
    assert f"99 is not in the range 1<=x<=64 (from {VARIABLES}_MAKE_NODES)." in run("here", MAKE_NODES="99").stderr
    assert "99 is not in the range 1<=x<=64.\n" in run("here", "--nodes", 99).stderr


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(OptionError, match=f"{VARIABLES}_MAKE_NODE names no option; did you mean {VARIABLES}_MAKE_NODES"):
        CliRunner().invoke(program, ["make", "here"], env={f"{VARIABLES}_MAKE_NODE": "1"}, catch_exceptions=False)


def test_print_config_gives_the_values_with_their_origins_as_a_file(write) -> None:
    file = write("nodes: 3\nsizes: 'no'\n")
    words = ("here", "--target", "a # b", "--target", "1e-3", "--config", file)
    result = run(*words, "--print-config")
    lines = [line.split("  # ") for line in result.stdout.splitlines()[2:]]
    origins = {line[0].lstrip("# ").partition(":")[0]: line[-1].strip() for line in lines}
    assert origins == {
        "place": "command line",
        "precision": "default",
        "targets": "command line",
        "nodes": str(file),
        "limit": "default: all",
        "rotate": "default",
        "force": "default",
        "sizes": str(file),
        "set": "default",
        "json": "default",
    }
    values = yaml.safe_load(result.stdout)
    assert values == {
        "place": "here", "precision": "low", "targets": ["a # b", "1e-3"], "nodes": 3, "force": False, "sizes": "no",
        "json": False,
    }  # fmt: skip
    printed = file.with_name("printed.yaml")
    printed.write_text(result.stdout)
    assert run("--config", printed).stdout == run(*words).stdout
    assert f"# {VARIABLES}_MAKE_NODES" in run("here", "--print-config", MAKE_NODES="9").stdout


def test_print_config_needs_no_required_values_and_checks_those_that_are_given() -> None:
    result = run("--print-config")
    assert result.exit_code == 0
    assert "# place:" in result.stdout
    assert "# needed" in result.stdout
    assert "Missing argument 'PLACE'" in run().stderr
    assert "99 is not in the range" in run("--print-config", "--nodes", 99).stderr


def test_the_printed_values_of_every_command_are_a_file_that_it_takes(tmp_path: Path) -> None:
    def walk(command: click.Command, *path: str):
        if not isinstance(command, click.Group):
            yield path
            return
        for name in command.list_commands(click.Context(command)):
            yield from walk(command.get_command(click.Context(command), name), *path, name)

    paths = list(walk(main))
    assert len(paths) > 25
    for path in paths:
        first = CliRunner().invoke(main, [*path, "--print-config"])
        assert first.exit_code == 0, (path, first.output)
        (tmp_path / "config.yaml").write_text(first.stdout)
        second = CliRunner().invoke(main, [*path, "--config", str(tmp_path / "config.yaml"), "--print-config"])
        assert second.exit_code == 0, (path, second.output)
        assert yaml.safe_load(second.stdout) == yaml.safe_load(first.stdout), path


def test_the_shared_options_have_no_place_in_the_values(write) -> None:
    assert run("here", "-q", "--config", write("log_level: error")).stdout == told()
    assert "log_level" not in run("here", "-v", "--print-config").stdout


def test_names_in_files_are_unique() -> None:
    from medusa_export.cli import COMMANDS, settings

    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        for one in command.commands.values() if isinstance(command, click.Group) else [command]:
            assert isinstance(one, Command)
            keys = [settings.key(param) for param in one.params]
            assert len(set(keys)) == len(keys), name
