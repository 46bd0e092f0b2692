"""Options of a command from a YAML file and from variables of the environment, and all of its values as such a file."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from medusa_runtime.errors import OptionError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FILE = f"{__name__}.file"  # key of a context's `meta`: the file that options were read from
DEFAULT_IN_HELP = re.compile(r"\[default: (.*?)\]")


class FieldOption(click.Option):
    """An option made from a field of a pydantic model. Its name in files is the field's, as in recipes.

    Args:
        args: as for `click.Option`.
        field: the field. Its default is the option's.
        kwargs: as for `click.Option`.
    """

    def __init__(self, *args: Any, field: FieldInfo, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.field = field


def key(param: click.Parameter) -> str:
    """A parameter's name in files and variables: the field's, or else the flag's with underscores."""
    if isinstance(param, FieldOption | click.Argument):
        return (param.name or "").lower()
    return _of_flag(param)


def _of_flag(param: click.Parameter) -> str:
    return max(param.opts, key=len).lstrip("-").replace("-", "_")


def _names(params: Iterable[click.Parameter]) -> dict[str, click.Parameter]:
    """Every name by which a file may call a parameter."""
    found: dict[str, click.Parameter] = {}
    for param in params:
        for name in {key(param), _of_flag(param)} if isinstance(param, click.Option) else {key(param)}:
            found[name] = param
    return found


def name_variables(params: Iterable[click.Parameter], prefix: str) -> None:
    """Name the variables of each option: the prefix, and one of the names that the option has in a file."""
    for param in params:
        if isinstance(param, click.Option) and param.allow_from_autoenv:
            own, others = _variables(param, prefix), param.envvar or []
            others = [others] if isinstance(others, str) else others
            param.envvar = [*own, *(name for name in others if name not in own)]


def _variables(param: click.Parameter, prefix: str) -> list[str]:
    return [f"{prefix}_{name.upper()}" for name in dict.fromkeys((key(param), _of_flag(param)))]


def require_known_variables(params: Iterable[click.Parameter], prefix: str) -> None:
    """Refuse a variable that is spelled as one of a command's options, but names none.

    Raises:
        OptionError: there is such a variable.
    """
    options = [param for param in params if isinstance(param, click.Option) and param.allow_from_autoenv]
    known = [name for option in options for name in _variables(option, prefix)]
    for name in sorted(os.environ):
        if name.startswith(f"{prefix}_") and name not in known:
            raise OptionError(f"the variable {name} names no option; {_hint(name, known, prefix)}")


def _hint(name: str, known: Sequence[str], rest: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"the names are: {', '.join(known)}" if len(known) < 9 else rest


def origin(ctx: click.Context, param: click.Parameter) -> str | None:
    """Where a value comes from, in words; None for the command line and for defaults."""
    match ctx.get_parameter_source(param.name or ""):
        case ParameterSource.ENVIRONMENT:
            names = [param.envvar] if isinstance(param.envvar, str) else param.envvar or ()
            return next((name for name in names if os.environ.get(name)), "the environment")
        case ParameterSource.DEFAULT_MAP:
            return str(ctx.meta.get(FILE, "the configuration"))
        case _:
            return None


def read(path: Path, command: str, own: Iterable[click.Parameter], params: Iterable[click.Parameter]) -> dict[str, Any]:
    """Read a file of options. Returns the values by the names that Click's parameters have.

    Args:
        path: a YAML file with one mapping.
        command: the command's name, for errors.
        own: the command's own parameters.
        params: these and the shared ones, which a file may set too.

    Raises:
        OptionError: the file cannot be read, names an option that the command does not have, or names one twice.
    """
    from medusa_export.recipe import document

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    data = {} if (found := document.load(text, str(path))) is None else found
    if not isinstance(data, Mapping):
        raise OptionError(f"{path}: it must hold options as NAME: VALUE, not {type(data).__name__} alone")
    named = _names([*own, *(param for param in params if key(param) in ("log_level", "quiet", "verbose"))])
    values: dict[str, Any] = {}
    for given, value in data.items():
        name = str(given).replace("-", "_")
        if name not in named:
            raise OptionError(
                f"{path}: `{command}` has no option {str(given)!r:.60}; "
                + _hint(name, list(named), f"see: medusa-export {command} --help")
            )
        param = named[name]
        if param.name in values:
            raise OptionError(f"{path}: {name} is given twice, once under another name; leave one out")
        if value is not None:
            values[param.name or ""] = _given(path, name, param, value)
    return values


def _given(path: Path, name: str, param: click.Parameter, value: Any) -> Any:
    """A file's value as Click takes it: as it would be typed, once for each time if the option may be repeated."""
    is_flag = isinstance(param, click.Option) and param.is_flag
    if is_flag:
        if not isinstance(value, bool):
            raise OptionError(f"{path}: {name} is {value!r:.60}; it must be true or false")
        return value
    if isinstance(value, bool):
        raise OptionError(f"{path}: {name} is {str(value).lower()}, but it is no switch; give a value, or leave it out")
    if isinstance(value, Mapping):
        value = [f"{one}={other}" for one, other in value.items()]
    is_many = param.multiple or param.nargs == -1
    values = list(value) if isinstance(value, list) else [value]
    if any(isinstance(one, list | dict) or one is None for one in values):
        raise OptionError(f"{path}: {name} holds a list or an object within a list; give plain values")
    typed = [str(one) for one in values]
    return typed if is_many else ",".join(typed)


def as_yaml(ctx: click.Context, command: str, params: Iterable[click.Parameter]) -> str:
    """The values that a command would run with, one a line, with their origins as comments.

    Strings are in quotes, as in JSON, so that none is taken for something else.

    Args:
        ctx: the context in which the command was parsed.
        command: the command's name.
        params: its own parameters.
    """
    lines = [(_line(ctx, param), _origin(ctx, param)) for param in params if param.expose_value]
    width = min(40, max((len(line) for line, _ in lines), default=0))
    head = f"# medusa-export {command} --config FILE\n"
    if ctx.auto_envvar_prefix is not None:
        head += f"# Each option is also a variable: {ctx.auto_envvar_prefix}_ and its name in capitals.\n"
    return head + "".join(f"{line:{width}}  # {origin}\n" for line, origin in lines)


def _line(ctx: click.Context, param: click.Parameter) -> str:
    value = ctx.params.get(param.name or "")
    if value in (None, ()) and isinstance(param, FieldOption):
        value = _plain_default(param.field)
    if value in (None, ()):
        return f"# {key(param)}:"
    return f"{key(param)}: {json.dumps(_as_data(value), ensure_ascii=False)}"


def _origin(ctx: click.Context, param: click.Parameter) -> str:
    if ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
        return "command line"
    if found := origin(ctx, param):
        return found
    if param.required:
        return "needed"
    told = DEFAULT_IN_HELP.search(getattr(param, "help", None) or "")
    return f"default: {told[1]}" if told and _line(ctx, param).startswith("#") else "default"


def _plain_default(field: FieldInfo) -> Any:
    """A field's default, if it is a value that says something."""
    default = field.default
    return default if isinstance(default, str | int | float | Path | tuple) and default != () else None


def _as_data(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_data(one) for one in value]
    return value if isinstance(value, str | int | float) else str(value)
