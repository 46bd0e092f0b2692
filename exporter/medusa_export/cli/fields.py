"""Command-line options made from a pydantic model: one field is the flag, the recipe's key and the documentation at once."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import annotated_types
import click
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from medusa_export.cli.settings import FieldOption
from medusa_export.command_options.flag import Flag, fields_of
from medusa_runtime.errors import OptionError

Function = Callable[..., Any]
Model = TypeVar("Model")


def options_from(model: type[Any], *, leave_out: Collection[str] = ()) -> Callable[[Function], Function]:
    """Add an option for each field of the model. A field that is not given on the command line keeps the model's default."""

    def add(function: Function) -> Function:
        for name, field in reversed(list(fields_of(model).items())):
            if name not in leave_out:
                function = _option(name, field)(function)
        return function

    return add


def parse(model: type[Model], values: dict[str, Any]) -> Model:
    """The model made from the options' values. Options that were not given are left out, if they have a default.

    Raises:
        OptionError: a value is out of range; the message names the flag.
    """
    fields = fields_of(model)
    needed = {name for name, field in fields.items() if field.is_required()}
    given = {name: value for name, value in values.items() if value not in (None, ()) or name in needed}
    try:
        return TypeAdapter(model).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of our own validators: the message is complete
            raise OptionError(str(first["ctx"]["error"])) from error
        name, *rest = map(str, first["loc"])
        flag = ".".join([_flags(name, fields[name])[-1], *rest])
        raise OptionError(f"{flag} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _option(name: str, field: FieldInfo) -> Callable[[Function], Function]:
    told, flags, kind = _told(field), _flags(name, field), _plain(field.annotation)
    text = _sentence(field.description or "")
    is_many = get_origin(kind) is tuple
    default = told.default or _default(field.default)
    if is_many:
        text += " May be repeated."
    if default:
        text += f" [default: {default}]"
    if kind is bool and field.default is not False:
        [flag] = flags
        text += " [default]" if field.default else ""
        return click.option(f"{flag}/--no-{flag[2:]}", cls=FieldOption, field=field, default=None, help=text)
    if kind is bool:
        return click.option(*flags, cls=FieldOption, field=field, is_flag=True, default=None, help=text)
    is_needed = field.is_required() and kind is field.annotation
    plain = get_args(kind)[0] if is_many else kind
    kinds = _click_type(plain, field, told)
    return click.option(
        *flags,
        name,
        cls=FieldOption,
        field=field,
        type=kinds,
        multiple=is_many,
        metavar=told.metavar,
        required=is_needed,
        help=text,
    )


def _told(field: FieldInfo) -> Flag:
    return next((found for found in field.metadata if isinstance(found, Flag)), Flag())


def _flags(name: str, field: FieldInfo) -> tuple[str, ...]:
    return _told(field).names or ("--" + name.replace("_", "-"),)


def _sentence(description: str) -> str:
    """A description as the help shows it. One that starts with a value (`int8: …`) keeps its first letter."""
    first = description if re.match(r"[\w-]+( only)?:", description) else description[:1].upper() + description[1:]
    return first if first.endswith("…") else f"{first}."


def _default(value: Any) -> str:
    """A default in a few words; empty if it says nothing by itself."""
    if value is PydanticUndefined or value is None or isinstance(value, bool | tuple):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(annotation: Any) -> Any:
    """The type, without `| None`."""
    if get_origin(annotation) in {Union, types.UnionType}:
        [annotation] = [part for part in get_args(annotation) if part is not type(None)]
    return annotation


def _click_type(kind: Any, field: FieldInfo, told: Flag) -> click.ParamType[Any] | type:
    if get_origin(kind) is Literal:
        return click.Choice(list(get_args(kind)))
    if kind is Path:
        return click.Path(path_type=Path, dir_okay=not told.is_file)
    least: Any = None
    most: Any = None
    open_least = open_most = False
    for bound in field.metadata:
        match bound:
            case annotated_types.Ge(ge=value):
                least = value
            case annotated_types.Gt(gt=value):
                least, open_least = value, True
            case annotated_types.Le(le=value):
                most = value
            case annotated_types.Lt(lt=value):
                most, open_most = value, True
    if least is None and most is None:
        return cast("type", kind)
    if kind is int:
        return click.IntRange(least, most, min_open=open_least, max_open=open_most)
    return click.FloatRange(least, most, min_open=open_least, max_open=open_most)
