"""Reading a request's JSON into a model, with errors that name the field."""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
from collections.abc import Sized
from typing import Annotated, Any, NoReturn, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from medusa_serve.errors import ApiError

MAX_DEPTH = 100  # of lists and objects in one another; schemas of real functions have about 20
MAX_VALUES = 100_000  # in a body, but for lists of tokens: each takes up to 200 bytes of memory as long as the request runs
TOKEN_LISTS = {"prompt", "tokens"}  # fields that hold tokens
LONGEST_NAME = 64  # of a field that is compared with those there are
MAX_ERRORS = 100  # pydantic takes seconds to describe a million
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a pair
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # a list that is refused for the first wrong item, not for each


class RequestBody(BaseModel):
    """The JSON of a request. A field that no one knows is refused by its name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def of(cls, body: bytes) -> Self:
        """Read a body.

        Raises:
            ApiError: it is no JSON object, or a field is unknown, missing, or has a value that it cannot have.
        """
        try:
            return cls.model_validate(parsed(body))
        except ValidationError as error:
            raise _refusal(error, cls) from error


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, of finite numbers and Unicode text alone.

    Raises:
        ApiError: it is none.
    """
    try:
        text = body.decode()
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
        if SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _invalid(f"the byte at position {error.start} is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise _invalid("it holds half of a surrogate pair, which is no Unicode text") from error
    except RecursionError as error:
        raise _invalid(f"it is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise _invalid("a number has too many digits" if "integer string" in str(error) else f"{error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {_kind(found)}; it must be an object", code="invalid_json")
    if text.count("[") + text.count("{") > MAX_DEPTH or len(text) > MAX_VALUES:
        _check_shape({name: value for name, value in found.items() if name not in TOKEN_LISTS})
    return found


def _invalid(why: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. One value of a name that is given twice would be ignored in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"an object has the name {twice!r:.80} twice")
    return found


def _check_shape(found: dict[str, Any]) -> None:
    """Refuse a body that is nested too deeply, or made of too many values."""
    level: list[Any] = [found]
    count = 0
    for _ in range(MAX_DEPTH):
        count += sum(map(len, level))
        if count > MAX_VALUES:
            raise ApiError(400, f"the body has more than {MAX_VALUES} values", code="too_much")
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise _invalid(f"it is nested deeper than {MAX_DEPTH} levels")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _kind(value: Any) -> str:
    return "null" if value is None else {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")


def _refusal(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first thing that is wrong, in one line."""
    if (count := error.error_count()) > MAX_ERRORS:
        told = f"the body has {count} wrong or unknown fields; /openapi.json describes those that there are"
        return ApiError(400, told, code="invalid_value")
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if isinstance(part, int) or part in _names(model) or not _is_branch(part)]
    name = ".".join(str(part)[:80] for part in path)[:200] or None
    match first["type"]:
        case "extra_forbidden":
            last = str(first["loc"][-1])
            is_near = len(first["loc"]) == 1 and len(last) <= LONGEST_NAME
            near = difflib.get_close_matches(last, _names(model), n=1) if is_near else []
            hint = f" Did you mean '{near[0]}'?" if near else ""
            return ApiError(400, f"Unknown parameter: '{name}'.{hint}", param=name, code="unknown_parameter")
        case "missing":
            return ApiError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
        case "value_error":
            told = first["ctx"]["error"]
            message = f"{told}" if isinstance(told, FieldError) else f"'{name}' {told}"
            named = getattr(told, "param", None) or name
            return ApiError(400, message, param=named, code=getattr(told, "code", None) or "invalid_value")
    asked = first["msg"].removeprefix("Input should be ")
    rule = f"; it must be {asked}" if asked != first["msg"] else f": {asked[:1].lower()}{asked[1:]}"
    return ApiError(400, f"'{name}' is {_shown(first['input'])}{rule}", param=name, code="invalid_value")


def _shown(value: Any) -> str:
    """A value, cut short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 78
    shown = " ".join(short.repr(value).split())
    return shown if len(shown) <= 80 else shown[:77] + "..."


def at_most(limit: int) -> BeforeValidator:
    """A limit on the items of a list or an object, checked before any item is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, Sized) and not isinstance(value, str) and len(value) > limit:
            raise ValueError(f"has {len(value)} items; it must have at most {limit}")
        return value

    return BeforeValidator(check)


def _names(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _is_branch(part: Any) -> bool:
    """Whether a part of a place is pydantic's name for one of several types, and not a field's."""
    return isinstance(part, str) and (
        part in {"str", "bool", "int", "float", "dict", "tuple"} or "[" in part or part[:1].isupper()
    )


class FieldError(ValueError):
    """A field that cannot be honoured, raised by a validator.

    Args:
        param: the field.
        message: what is wrong with it.
        code: a name of the error for programs.
    """

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


def unsupported(param: str, why: str) -> FieldError:
    """An error for a field that this server cannot honour."""
    return FieldError(param, f"'{param}' is not supported: {why}", "unsupported_parameter")
