"""Reading a request's JSON into a model, with errors that name the field."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from medusa_serve.errors import ApiError


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
    """The JSON object of a body, of finite numbers and Unicode text alone."""
    try:
        found = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a surrogate pair, which is no Unicode text", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"
        raise ApiError(400, f"the body is not valid JSON: {told}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {_kind(found)}; it must be an object", code="invalid_json")
    return found


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
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, int) or part in _names(model) or not _is_branch(part)]
    name = ".".join(str(part) for part in path) or None
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _names(model), n=1) if len(first["loc"]) == 1 else []
            hint = f" Did you mean '{near[0]}'?" if near else ""
            return ApiError(400, f"Unknown parameter: '{name}'.{hint}", param=name, code="unknown_parameter")
        case "missing":
            return ApiError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
        case "value_error":
            told = first["ctx"]["error"]
            named = getattr(told, "param", None) or name
            return ApiError(400, f"{told}", param=named, code=getattr(told, "code", None) or "invalid_value")
    shown = " ".join(repr(first["input"]).split())
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    asked = first["msg"].removeprefix("Input should be ")
    return ApiError(400, f"'{name}' is {shown}; it must be {asked}", param=name, code="invalid_value")


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
