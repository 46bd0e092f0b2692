"""The fields of each section of a recipe: the options of the command that does the step, without what other steps give."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from medusa_export.command_options.distill_options import DistillOptions
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.flag import fields_of
from medusa_export.command_options.validate_settings import ValidateSettings
from medusa_heads.train.settings import TrainSettings

SECTIONS = ("distill", "train", "onnx", "validate")
ELSEWHERE = {"model", "output", "heads", "force"}  # given by other steps, or by `recipes run`
MACHINE = {"device", "threads"}  # the hardware that a step runs on: it does not change the result
TRUST = {"trust_remote_code", "allow_engine_code"}  # decided by whoever runs a recipe, not by its author


@functools.cache
def section(name: str) -> type[BaseModel]:
    """The pydantic model of a section."""
    models: dict[str, type[BaseModel]] = {
        "distill": _part("distill", DistillOptions),
        "train": TrainSettings,
        "onnx": _part("onnx", ExportOptions),
        "validate": ValidateSettings,
    }
    return models[name]


def _part(name: str, options: type[Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        field: (info.annotation, info) for field, info in fields_of(options).items() if field not in {*ELSEWHERE, *TRUST}
    }
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    return model
