"""What a recipe says, and one line for each thing that is wrong with one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from medusa_export.recipe import document
from medusa_export.recipe.sections import SECTIONS, section
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.errors import OptionError

STEPS = ("fetch", *SECTIONS)
LINE = r"^\S(.*\S)?$"
SET = "--set"
Model = TypeVar("Model", bound=BaseModel)


class RecipeError(OptionError):
    """A recipe cannot be used.

    Attributes:
        lines: all that is wrong, a line each.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        super().__init__(lines[0] if len(lines) == 1 else f"{lines[0]} (and {len(lines) - 1} more)")


class Recipe(BaseModel):
    """A recipe. A section that is not there is a step that is not run.

    Paths that are read are looked for beside the recipe's file, then where the command runs.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=LINE, description="that of the file, without its ending")
    description: str = Field(pattern=LINE, description="what it is for, in one line")
    model: str = Field(pattern=LINE, description="a name that fetch knows, a directory, a hub id or a GGUF file")
    output: Path = Field(description="the directory that everything goes to, from where the command runs")
    heads: Path | None = Field(default=None, description="heads to export, where none are trained")
    distill: dict[str, Any] | None = Field(default=None, description="as `medusa-export distill`")
    data: tuple[Path, ...] = Field(default=(), description="further data to train on")
    exclude: tuple[Path, ...] = Field(default=(), description="texts to evaluate on: answers that share 13 words with them go")
    train: dict[str, Any] | None = Field(default=None, description="as `medusa-export train`")
    onnx: dict[str, Any] | None = Field(default=None, description="as `medusa-export onnx`")
    validation: dict[str, Any] | None = Field(default=None, alias="validate", description="as `medusa-export validate`")

    @field_validator(*(name if name != "validate" else "validation" for name in SECTIONS), mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is None:
            raise PydanticCustomError("empty", "this is empty; write {} to take the defaults, or leave it out")
        return value

    def section(self, name: str) -> dict[str, Any] | None:
        """The settings of a step."""
        found: dict[str, Any] | None = getattr(self, "validation" if name == "validate" else name)
        return found

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps there are, in their order."""
        return ("fetch", *(name for name in SECTIONS if self.section(name) is not None))

    @property
    def method(self) -> str | None:
        """How heads are trained; none where they are not."""
        return None if self.train is None else str(self.train.get("method", TrainSettings().method))

    def to_yaml(self) -> str:
        """The recipe with every field that it has."""
        fields = self.model_dump(mode="json", by_alias=True)
        kept = {name: value for name, value in fields.items() if value is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10**6)


def outline(text: str, where: str) -> Recipe:
    """Read a recipe's own fields and leave its sections as they are, which needs no PyTorch.

    Args:
        text: YAML.
        where: what it is called in errors.

    Raises:
        RecipeError: a field is wrong.
    """
    return _Reader(where, _mapping(text, where), set()).outline()


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, check every field and fill in the defaults.

    Args:
        text: YAML.
        where: what it is called in errors.
        overrides: `section.field=value`, which come in place of what the text says.

    Raises:
        RecipeError: fields are wrong, or contradict each other.
    """
    data, keys = _mapping(text, where), set()
    for override in overrides:
        keys.add(_override(data, override))
    return _Reader(where, data, keys).whole()


class _Reader:
    def __init__(self, where: str, data: dict[str, Any], overridden: set[str]) -> None:
        self.where, self.data, self.overridden = where, data, overridden
        self.lines: list[str] = []

    def outline(self) -> Recipe:
        recipe = self._check(Recipe, self.data)
        if recipe is None:
            raise RecipeError(self.lines)
        return recipe

    def whole(self) -> Recipe:
        recipe = self._check(Recipe, self.data)
        filled = {}
        for name in SECTIONS:
            found = self.data.get(name)
            if isinstance(found, dict) and (checked := self._check(section(name), found, name)) is not None:
                filled["validation" if name == "validate" else name] = checked.model_dump()
        if recipe is not None:
            self.lines += [f"{self.where}: {line}" for line in _contradictions(recipe)]
        if recipe is None or self.lines:
            raise RecipeError(self.lines)
        return recipe.model_copy(update=filled)

    def _check(self, model: type[Model], data: Any, *prefix: str) -> Model | None:
        try:  # as JSON, so that what JSON has no word for (a path, a tuple) is taken, and nothing else is
            return model.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            self.lines += [self._line(found, model, prefix) for found in error.errors()]
        except (ValueError, RecursionError):  # it refers to itself
            self.lines.append(f"{self.where} holds something within itself")
        return None

    def _line(self, error: ErrorDetails, model: type[BaseModel], prefix: tuple[str, ...]) -> str:
        path = [*prefix, *map(str, error["loc"])]
        where = SET if any(_is_within(path, key.split(".")) for key in self.overridden) else self.where
        return f"{where}: {'.'.join(path) or 'recipe'}: {_reason(error, model)}"


def _is_within(path: list[str], other: list[str]) -> bool:
    """Whether one of two paths leads to the other."""
    return all(ours == theirs for ours, theirs in zip(path, other, strict=False))


def _reason(error: ErrorDetails, model: type[BaseModel]) -> str:
    match error["type"]:
        case "extra_forbidden":
            names = [field.alias or name for name, field in model.model_fields.items()]
            close = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
            return "there is no such field" + (f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}")
        case "missing":
            return "this is missing"
        case "empty":
            return error["msg"]
        case _:
            return f"{error['msg'][:1].lower()}{error['msg'][1:]}, found {error['input']!r:.60}"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    if recipe.steps == ("fetch",):
        yield f"there is nothing to do; give at least one of {', '.join(SECTIONS)}"
    if recipe.train is not None and recipe.distill is None and not recipe.data:
        yield "train: there is nothing to train on; give distill, or data"
    if recipe.train is None and recipe.data:
        yield "data: nothing is trained on it; give train, or leave it out"
    if recipe.train is None and recipe.exclude:
        yield "exclude: nothing is trained; give train, or leave it out"
    if recipe.train is not None and recipe.heads is not None:
        yield "heads: train makes them; leave it out, or give train.start_from"
    if recipe.train is None and recipe.onnx is None and recipe.heads is not None:
        yield "heads: nothing is made of them; give onnx, or leave it out"
    if recipe.onnx is not None and recipe.train is None and recipe.heads is None:
        yield "onnx: there are no heads to export; give train, or heads"
    if recipe.validation is not None and recipe.onnx is None:
        yield "validate: there is no bundle to validate; give onnx"


def _mapping(text: str, where: str) -> dict[str, Any]:
    data = document.load(text, where)
    if not isinstance(data, dict):
        raise RecipeError([f"{where} is no recipe: it holds {'nothing' if data is None else 'no fields'}"])
    return data


def _override(data: dict[str, Any], override: str) -> str:
    """Put a value into the data. Returns the path of its field."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        raise OptionError(f"{SET} is {override!r}, not section.field=value")
    value = document.load(text, f"{SET} {path}")
    node: Any = data
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise OptionError(f"{SET} {path}: {key} holds no fields")
    node[last] = value
    if not parents and value is None:  # a step less
        del node[last]
    return path
