"""The fields of each section of a recipe, derived from the options of the command that does the step."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, Literal, get_type_hints

import click
from pydantic import BaseModel, ConfigDict, Field, create_model

from medusa_export.command_options.distill_options import distill_options
from medusa_export.command_options.onnx_options import onnx_options
from medusa_export.command_options.shared_options import Function, declared
from medusa_export.command_options.validate_options import validate_options
from medusa_heads.train.settings import TrainSettings

SECTIONS = ("distill", "train", "onnx", "validate")
ELSEWHERE = {"model", "output", "heads", "bundle", "reference", "force"}  # given by other steps, or by `recipes run`
MACHINE = {"device", "threads"}  # the hardware that a step runs on: it does not change the result
ON_CPU = {"backend", "device", "threads", "cuda_graphs"}  # a recipe's bundle is validated on the CPU, where all its graphs run
TRUST = {"trust_remote_code"}  # decided by whoever runs a recipe, not by its author


@functools.cache
def section(name: str) -> type[BaseModel]:
    """The pydantic model of a section. It is made when needed, since `onnx` and `validate` import PyTorch."""
    makers: dict[str, Callable[[], type[BaseModel]]] = {
        "distill": _distill,
        "train": lambda: TrainSettings,
        "onnx": _onnx,
        "validate": _validate,
    }
    return makers[name]()


def _distill() -> type[BaseModel]:
    from medusa_export.head_training.distillation import DistillOptions  # noqa: PLC0415

    return _derived("distill", DistillOptions, distill_options)


def _onnx() -> type[BaseModel]:
    from medusa_export.bundle.export import ExportOptions  # noqa: PLC0415 - imports PyTorch

    return _derived("onnx", ExportOptions, onnx_options)


def _validate() -> type[BaseModel]:
    from medusa_export.check import validate  # noqa: PLC0415 - imports PyTorch

    return _derived("validate", validate, validate_options, leave_out=ON_CPU)


def _derived(
    name: str,
    target: Callable[..., Any],
    command_options: Callable[[Function], Function],
    *,
    leave_out: Collection[str] = (),
) -> type[BaseModel]:
    """A pydantic model with the target's arguments as fields. Their limits are those of the options of the same names."""
    hints, options = get_type_hints(target), declared(command_options)
    fields: dict[str, Any] = {}
    for argument, default in _defaults(target).items():
        if argument not in {*ELSEWHERE, *TRUST, *leave_out}:
            option = options.get(argument)
            annotation, bounds = _bounds(hints[argument], option.type if option else None)
            fields[argument] = (annotation, Field(default=default, description=getattr(option, "help", None), **bounds))
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    return model


def _defaults(target: Callable[..., Any]) -> dict[str, Any]:
    if not dataclasses.is_dataclass(target):
        return {name: argument.default for name, argument in inspect.signature(target).parameters.items()}
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(target)
    }


def _bounds(annotation: Any, kind: click.ParamType[Any] | None) -> tuple[Any, dict[str, Any]]:
    """The type of a field, and the limits that the option's type has."""
    if isinstance(kind, click.Choice) and annotation is str:
        return Literal[tuple(kind.choices)], {}
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return annotation, {}
    limits = {"gt" if kind.min_open else "ge": kind.min, "lt" if kind.max_open else "le": kind.max}
    return annotation, {name: limit for name, limit in limits.items() if limit is not None}
