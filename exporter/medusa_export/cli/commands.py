"""What all commands share: options from files and variables, `--print-config`, how much is printed, and the form of the help.

A command is made with `click.command(..., cls=Command)`, a group with `click.group(..., cls=Group)`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from medusa_export.cli import settings
from medusa_export.cli.examples import EXAMPLES
from medusa_export.cli.headings import in_groups
from medusa_export.cli.verbosity import LEVELS, verbosity, wanted

VARIABLES = "MEDUSA_EXPORT"  # the prefix of the variables with options; Click adds the command's name
PRINTING = f"{__name__}.printing"  # key of a context's `meta`: only the values are asked for
SHARED = ("config", "print_config", "quiet", "verbose", "log_level", "help")
MEANT = {  # commands that people look for under other names
    "build": "trt", "chat": "generate", "compare": "diff", "evaluate": "heads evaluate", "export": "onnx", "info": "inspect",
    "help": "--help", "init": "heads init", "run": "generate", "show": "inspect", "version": "--version",
}  # fmt: skip


class _PrintConfig(Exception):  # noqa: N818 - a signal, no error
    """`--print-config` was read."""


class Command(click.Command):
    """A command that takes options from the command line, variables and a file, in this order, and has the shared options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        taken = {flag for param in self.params for flag in param.opts}
        self.params += [option for option in _shared_options() if taken.isdisjoint(option.opts)]

    @property
    def own_params(self) -> list[click.Parameter]:
        """The options and arguments of this command alone."""
        return [param for param in self.params if param.name not in SHARED or isinstance(param, settings.FieldOption)]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """See click. If only the values are asked for, none is required."""
        params = super().get_params(ctx)
        if PRINTING not in ctx.meta:
            return params
        if ctx.meta[PRINTING] is None:  # Click compares them by identity: make them once
            ctx.meta[PRINTING] = [_optional(param) for param in params]
        relaxed: list[click.Parameter] = ctx.meta[PRINTING]
        return relaxed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click."""
        if ctx.auto_envvar_prefix is not None:
            settings.name_variables(self.params, ctx.auto_envvar_prefix)
            settings.require_known_variables(self.params, ctx.auto_envvar_prefix)
        given = list(args)
        try:
            return self._parse(ctx, args)
        except _PrintConfig:
            ctx.meta[PRINTING] = None
            ctx.params.clear()
            return self._parse(ctx, given)

    def _parse(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is not None and (origin := settings.origin(ctx, error.param)):
                told = f"{error.message.rstrip('.')} (from {origin})."
                raise click.BadParameter(told, error.ctx, error.param, error.param_hint) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """See click."""
        shared = {name: ctx.params.pop(name, None) for name in SHARED if self._is_shared(name)}
        level = wanted(shared["quiet"], shared.get("verbose"), shared["log_level"])
        if PRINTING in ctx.meta:
            click.echo(settings.as_yaml(ctx, words_of(ctx), self.own_params), nl=False)
            return None
        with verbosity(level):
            return super().invoke(ctx)

    def _is_shared(self, name: str) -> bool:
        return all(param.name != name for param in self.own_params)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups."""
        format_groups(ctx, self, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        format_examples(ctx, formatter)


class Group(click.Group):
    """A group of such commands. It says which command was probably meant."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """See click."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"there is no command {name!r}; {_did_you_mean(ctx, name, known)}", ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        format_examples(ctx, formatter)


def words_of(ctx: click.Context) -> str:
    """A command's name with those of its groups, without the program's: `heads init`."""
    names: list[str] = []
    context: click.Context | None = ctx
    while context is not None and context.parent is not None:
        names.append(context.info_name or "")
        context = context.parent
    return " ".join(reversed(names)) or (ctx.info_name or "")


def format_groups(ctx: click.Context, command: click.Command, formatter: click.HelpFormatter, name: str | None = None) -> None:
    """Write a command's options under headings.

    Args:
        ctx: the context of the help.
        command: the command.
        formatter: where to write.
        name: the command's, if the context is not its own.
    """
    options = {settings.key(param): param for param in command.get_params(ctx) if isinstance(param, click.Option)}
    for heading, keys in in_groups(name or words_of(ctx), list(options), SHARED).items():
        records = [record for key in keys if (record := options[key].get_help_record(ctx)) is not None]
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def format_examples(ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's examples, each on a line of its own, so that they can be copied."""
    if lines := EXAMPLES.get(words_of(ctx)):
        with formatter.section("Examples"):
            for line in lines:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _did_you_mean(ctx: click.Context, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    if not close and ctx.parent is None and name in MEANT:
        close = [MEANT[name]]
    return f"did you mean {close[0]}?" if close else f"the commands are: {', '.join(known)}"


def _optional(param: click.Parameter) -> click.Parameter:
    copied = copy.copy(param)
    copied.required = False
    return copied


def _shared_options() -> Iterator[click.Option]:
    yield click.Option(
        ["--config"],
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        is_eager=True,
        callback=_read_config,
        help="Take options from this YAML file. The command line and variables come first. See --print-config.",
    )
    yield click.Option(
        ["--print-config"],
        is_flag=True,
        is_eager=True,
        allow_from_autoenv=False,
        callback=_print_config,
        help="Print all values that this command would run with, and the origin of each, as a file for --config.",
    )
    yield click.Option(["-q", "--quiet"], is_flag=True, help="Print results and errors alone: --log-level error.")
    yield click.Option(
        ["-v", "--verbose"], is_flag=True, help="Print more, such as what each graph pass did and why: --log-level debug."
    )
    yield click.Option(
        ["--log-level"],
        type=click.Choice(LEVELS),
        envvar=f"{VARIABLES}_LOG_LEVEL",
        help="How much is printed to stderr. [default: info]",
    )


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not ctx.resilient_parsing:
        command = ctx.command
        assert isinstance(command, Command)
        ctx.default_map = settings.read(path, words_of(ctx), command.own_params, command.params)
        ctx.meta[settings.FILE] = path
    return path


def _print_config(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value and PRINTING not in ctx.meta and not ctx.resilient_parsing:
        raise _PrintConfig
    return value
