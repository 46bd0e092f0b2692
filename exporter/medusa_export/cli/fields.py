"""Command-line options made from a pydantic model: one field is the flag, the recipe's key and the documentation at once."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from medusa_runtime.errors import OptionError

Function = Callable[..., Any]
Model = TypeVar("Model", bound=BaseModel)


def options_from(model: type[BaseModel], *, leave_out: Collection[str] = ()) -> Callable[[Function], Function]:
    """Add an option for each field of the model. A field that is not given on the command line keeps the model's default."""

    def add(function: Function) -> Function:
        for name, field in reversed(model.model_fields.items()):
            if name not in leave_out:
                function = _option(name, field)(function)
        return function

    return add


def parse(model: type[Model], values: dict[str, Any]) -> Model:
    """The model made from the options' values. Options that were not given are left out.

    Raises:
        OptionError: a value is out of range; the message names the flag.
    """
    try:
        return model.model_validate({name: value for name, value in values.items() if value not in (None, ())})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of our own validators: the message is complete
            raise OptionError(str(first["ctx"]["error"])) from error
        flag = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        raise OptionError(f"{flag} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _option(name: str, field: FieldInfo) -> Callable[[Function], Function]:
    flag, kind = "--" + name.replace("_", "-"), _plain(field.annotation)
    text = f"{(field.description or '')[:1].upper()}{(field.description or '')[1:]}."
    if kind is bool and field.default is not False:
        text += " [default]" if field.default else ""
        return click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)
    if kind is bool:
        return click.option(flag, is_flag=True, default=None, help=text)
    if get_origin(kind) is tuple:
        return click.option(flag, type=get_args(kind)[0], multiple=True, help=f"{text} May be repeated.")
    if field.default is not None:
        text += f" [default: {field.default:g}]" if kind is float else f" [default: {field.default}]"
    return click.option(flag, type=_click_type(kind, field), help=text)


def _plain(annotation: Any) -> Any:
    """The type, without `| None`."""
    if get_origin(annotation) in {Union, types.UnionType}:
        [annotation] = [part for part in get_args(annotation) if part is not type(None)]
    return annotation


def _click_type(kind: Any, field: FieldInfo) -> click.ParamType[Any] | type:
    if get_origin(kind) is Literal:
        return click.Choice(list(get_args(kind)))
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
    if kind is int:
        return click.IntRange(least, most, min_open=open_least, max_open=open_most)
    if kind is float:
        return click.FloatRange(least, most, min_open=open_least, max_open=open_most)
    return str
