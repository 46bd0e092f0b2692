"""The help of every command: options in groups, examples that are right, and what is said about misspelt words."""

from __future__ import annotations

import importlib.metadata
import logging
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from medusa_export import progress
from medusa_export.cli import COMMANDS, headings, main, settings
from medusa_export.cli.commands import MEANT, SHARED, Command, Group, words_of
from medusa_export.cli.examples import EXAMPLES
from medusa_export.cli.verbosity import wanted
from medusa_export.measure.bench.bench_options import MODES
from medusa_runtime.errors import OptionError


def contexts() -> Iterator[click.Context]:
    """The context of every command and group, below the program's."""

    def below(parent: click.Context) -> Iterator[click.Context]:
        assert isinstance(parent.command, click.Group)
        for name in parent.command.list_commands(parent):
            command = parent.command.get_command(parent, name)
            assert command is not None
            context = click.Context(command, parent=parent, info_name=name)
            yield context
            if isinstance(command, click.Group):
                yield from below(context)

    yield from below(click.Context(main, info_name="medusa-export"))


def names() -> list[str]:
    return [words_of(context) for context in contexts()]


def test_every_command_is_one_of_ours_and_has_examples() -> None:
    for context in contexts():
        assert isinstance(context.command, Command | Group), words_of(context)
        assert EXAMPLES.get(words_of(context)), words_of(context)
        shown = context.get_help()
        assert all(f"  {line}\n" in f"{shown}\n" for line in EXAMPLES[words_of(context)])
    assert set(EXAMPLES) <= set(names())
    assert {line.split()[0] for line in names()} == set(COMMANDS)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_an_example_can_be_typed_as_it_stands(line: str, tmp_path) -> None:
    words = shlex.split(line.replace("train.yaml", str(tmp_path / "train.yaml")), comments=True)
    for sign in ("<", ">"):
        words = words[: words.index(sign)] if sign in words else words
    (tmp_path / "train.yaml").write_text("model: MODEL\ndata: data\noutput: heads\n")
    assert words[0] == "medusa-export"
    context: click.Context = main.make_context(words[0], words[1:])
    while isinstance(context.command, click.Group):
        left = [*context._protected_args, *context.args]
        name, command, left = context.command.resolve_command(context, left)
        assert command is not None
        context = command.make_context(name, left, parent=context)
    if "--print-config" not in words:
        assert all(context.params[param.name] is not None for param in context.command.params if param.required)


def test_the_options_of_a_command_stand_in_groups_and_each_of_them_once() -> None:
    for context in contexts():
        if isinstance(context.command, click.Group):
            continue
        options = [param for param in context.command.get_params(context) if isinstance(param, click.Option)]
        keys = [settings.key(option) for option in options]
        groups = headings.in_groups(words_of(context), keys, SHARED)
        assert sorted(key for group in groups.values() for key in group) == sorted(keys)
        assert list(groups)[-1] == headings.ALL
        assert len(groups.get(headings.OTHER, ())) <= 10, f"{words_of(context)}: give the options headings of their own"
        for heading in groups:
            assert f"\n{heading}:\n" in context.get_help()


def test_headings_name_options_that_there_are() -> None:
    known = {
        words_of(context): {settings.key(param) for param in context.command.get_params(context)} for context in contexts()
    }
    for command, groups in headings._OWN.items():
        for heading, keys in groups.items():
            if heading not in headings._API:  # `serve` and `ray` have most of these
                unknown = {key for key in keys if key not in known[command]}
                assert unknown <= {"num_replicas"}, (command, heading)
    assert set(MEANT).isdisjoint(COMMANDS)
    assert {meaning.partition(" ")[0] for meaning in MEANT.values()} <= {*COMMANDS, "--help", "--version"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("onxn", "there is no command 'onxn'; did you mean onnx?"),
        ("export", "there is no command 'export'; did you mean onnx?"),
        ("quantise b -o c", "there is no command 'quantise'; did you mean quantize?"),
        ("zzzz", "there is no command 'zzzz'; the commands are: fetch, distill"),
        ("heads evalute", "there is no command 'evalute'; did you mean evaluate?"),
        ("trt inspekt e", "there is no command 'inspekt'; did you mean inspect?"),
        ("onnx m --ouptut b", "No such option '--ouptut'."),
        ("onnx m -o b --tree-node 3", "--tree-nodes"),
    ],
)
def test_a_misspelt_word_is_told_with_the_one_that_was_meant(words: str, message: str) -> None:
    result = CliRunner().invoke(main, words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr.splitlines()[-1]


def test_version_tells_what_is_installed() -> None:
    lines = CliRunner().invoke(main, ["--version"]).stdout.splitlines()
    assert lines[0] == f"medusa-export {importlib.metadata.version('medusa-export')}"
    versions = dict(line.split(" ", 1) for line in lines)
    assert {"python", "numpy", "tokenizers"} <= versions.keys()
    assert versions["numpy"] == importlib.metadata.version("numpy")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_this_program(shell: str) -> None:
    script = CliRunner().invoke(main, ["completion", shell]).stdout
    assert "_MEDUSA_EXPORT_COMPLETE" in script
    assert f"{shell}_complete" in script
    if found := shutil.which(shell):
        assert subprocess.run([found, "-n"], input=script, text=True, check=False).returncode == 0


def completed(line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        "_MEDUSA_EXPORT_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(main, [], prog_name="medusa-export", env=environment)
    return [found.partition(",")[2] for found in result.stdout.splitlines()]


def test_commands_options_and_values_are_completed() -> None:
    assert completed("medusa-export tu") == ["tune"]
    assert completed("medusa-export heads ev") == ["evaluate"]
    assert completed("medusa-export tune b --max-no") == ["--max-nodes", "--max-noise"]
    assert completed("medusa-export quantize b --scheme int8-b") == ["int8-blocks"]


def test_levels_of_printing() -> None:
    assert wanted(False, False, None) == "info"
    assert wanted(True, False, None) == "error"
    assert wanted(False, True, None) == "debug"
    assert wanted(False, False, "warning") == "warning"
    assert wanted(True, False, "error") == "error"
    with pytest.raises(OptionError, match="--quiet and --verbose exclude each other"):
        wanted(True, True, None)
    with pytest.raises(OptionError, match="--quiet means --log-level error, but --log-level is info; give one"):
        wanted(True, False, "info")


@click.command("say", cls=Command)
def say() -> None:
    progress.note("a note")
    logging.getLogger("medusa_export.passes").info("a pass")
    logging.getLogger("medusa_runtime").warning("a warning")
    click.echo("a result")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), ["a note"]),
        (("-q",), []),
        (("--log-level", "error"), []),
        (("--log-level", "warning"), []),
        (("-v",), ["a note", "a pass", "a warning"]),
        (("--log-level", "debug"), ["a note", "a pass", "a warning"]),
    ],
)
def test_a_command_prints_as_much_as_it_should(words, told, capsys) -> None:
    before = logging.getLogger("medusa_export").level
    say.main([*words], standalone_mode=False)
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    lines = [line.strip() for line in captured.err.splitlines()]
    assert [line for line in lines if line != "a warning" or "a pass" in told] == told
    assert logging.getLogger("medusa_export").level == before
    assert not logging.getLogger("medusa_export").handlers


def test_no_color_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal with NO_COLOR, nothing is coloured (https://no-color.org)."""
    from medusa_export.console import Console

    def shown() -> str:
        console = Console(force_terminal=True, color_system="truecolor", highlight=False)
        with console.capture() as captured:
            console.print("[green]passed")
        return captured.get()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown()


def test_examples_of_bench_name_modes_that_there_are() -> None:
    named = [shlex.split(example) for example in EXAMPLES["bench"]]
    modes = [words[words.index("--modes") + 1].split(",") for words in named if "--modes" in words]
    assert modes
    assert all(mode in MODES for listed in modes for mode in listed)
