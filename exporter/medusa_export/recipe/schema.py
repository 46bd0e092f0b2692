"""The fields of a recipe, and one error line for each mistake in one."""

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
from medusa_export.recipe.recipe_sections import SECTIONS, section
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.errors import OptionError

STEPS = ("fetch", *SECTIONS)
LINE = r"^\S(.*\S)?$"
SET = "--set"
Model = TypeVar("Model", bound=BaseModel)


class RecipeError(OptionError):
    """A recipe cannot be used.

    Attributes:
        lines: all errors, one line each.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        super().__init__(lines[0] if len(lines) == 1 else f"{lines[0]} (and {len(lines) - 1} more)")


class Recipe(BaseModel):
    """A recipe. If a section is missing, its step is not run.

    Paths of inputs are relative to the recipe's file, or else to the current directory.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=LINE, description="the recipe's name: its file's name without the ending")
    description: str = Field(pattern=LINE, description="the recipe's purpose, in one line")
    model: str = Field(pattern=LINE, description="a name that fetch knows, a directory, a hub id or a GGUF file")
    output: Path = Field(description="the directory for all results, relative to the current directory")
    heads: Path | None = Field(default=None, description="heads to export, if the recipe trains none")
    distill: dict[str, Any] | None = Field(default=None, description="options of `medusa-export distill`")
    data: tuple[Path, ...] = Field(default=(), description="more data to train on")
    exclude: tuple[Path, ...] = Field(
        default=(), description="evaluation texts: answers that share 13 words with them are dropped"
    )
    train: dict[str, Any] | None = Field(default=None, description="options of `medusa-export train`")
    onnx: dict[str, Any] | None = Field(default=None, description="options of `medusa-export onnx`")
    validation: dict[str, Any] | None = Field(default=None, alias="validate", description="options of `medusa-export validate`")

    @field_validator(*(name if name != "validate" else "validation" for name in SECTIONS), mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is None:
            raise PydanticCustomError("empty", "the section is empty; write {} to use the defaults, or leave the section out")
        return value

    def section(self, name: str) -> dict[str, Any] | None:
        """The settings of a step."""
        found: dict[str, Any] | None = getattr(self, "validation" if name == "validate" else name)
        return found

    @property
    def steps(self) -> tuple[str, ...]:
        """The recipe's steps, in order."""
        return ("fetch", *(name for name in SECTIONS if self.section(name) is not None))

    @property
    def method(self) -> str | None:
        """The training method, or None if the recipe trains no heads."""
        return None if self.train is None else str(self.train.get("method", TrainSettings().method))

    def to_yaml(self) -> str:
        """The recipe as YAML, with every field that has a value."""
        fields = self.model_dump(mode="json", by_alias=True)
        kept = {name: value for name, value in fields.items() if value is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10**6)


def outline(text: str, where: str) -> Recipe:
    """Read a recipe's top-level fields without checking its sections. This needs no PyTorch.

    Args:
        text: YAML.
        where: the recipe's name in errors.

    Raises:
        RecipeError: a field is wrong.
    """
    return _Reader(where, _mapping(text, where), set()).outline()


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, check every field and fill in the defaults.

    Args:
        text: YAML.
        where: the recipe's name in errors.
        overrides: `section.field=value`. They replace values of the text.

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
        try:  # as JSON: strict, but a string is accepted as a path and a list as a tuple
            return model.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            self.lines += [self._line(found, model, prefix) for found in error.errors()]
        except (ValueError, RecursionError):  # a YAML alias that contains itself
            self.lines.append(f"{self.where} has an alias (*) that refers to itself; write the value out")
        return None

    def _line(self, error: ErrorDetails, model: type[BaseModel], prefix: tuple[str, ...]) -> str:
        path = [*prefix, *map(str, error["loc"])]
        where = SET if any(_is_within(path, key.split(".")) for key in self.overridden) else self.where
        return f"{where}: {'.'.join(path) or 'recipe'}: {_reason(error, model)}"


def _is_within(path: list[str], other: list[str]) -> bool:
    """Whether one of two field paths is a prefix of the other."""
    return all(ours == theirs for ours, theirs in zip(path, other, strict=False))


def _reason(error: ErrorDetails, model: type[BaseModel]) -> str:
    match error["type"]:
        case "extra_forbidden":
            names = [field.alias or name for name, field in model.model_fields.items()]
            close = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
            return "there is no such field" + (
                f"; did you mean {close[0]}?" if close else f"; the fields are: {', '.join(names)}"
            )
        case "missing":
            return "the field is missing"
        case "empty":
            return error["msg"]
        case _:
            return f"{error['msg'][:1].lower()}{error['msg'][1:]}, found {error['input']!r:.60}"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    if recipe.steps == ("fetch",):
        yield f"there is nothing to do; add at least one of {', '.join(SECTIONS)}"
    if recipe.train is not None and recipe.distill is None and not recipe.data:
        yield "train: there is no data to train on; add distill, or data"
    if recipe.train is None and recipe.data:
        yield "data: the recipe trains no heads; add train, or remove data"
    if recipe.train is None and recipe.exclude:
        yield "exclude: the recipe trains no heads; add train, or remove exclude"
    if recipe.train is not None and recipe.heads is not None:
        yield "heads: train makes the heads; remove heads, or use train.start_from"
    if recipe.train is None and recipe.onnx is None and recipe.heads is not None:
        yield "heads: the recipe exports no heads; add onnx, or remove heads"
    if recipe.onnx is not None and recipe.train is None and recipe.heads is None:
        yield "onnx: there are no heads to export; add train, or heads"
    if recipe.validation is not None and recipe.onnx is None:
        yield "validate: there is no bundle to validate; add onnx"


def _mapping(text: str, where: str) -> dict[str, Any]:
    data = document.load(text, where)
    if not isinstance(data, dict):
        raise RecipeError([f"{where} is not a recipe: {'it is empty' if data is None else 'it has no fields'}"])
    return data


def _override(data: dict[str, Any], override: str) -> str:
    """Set the field of an override in the data. Returns the field's path."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        raise OptionError(f"{SET} is {override!r}; it must be section.field=value")
    value = document.load(text, f"{SET} {path}")
    node: Any = data
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise OptionError(f"{SET} {path}: {key} has no fields")
    node[last] = value
    if not parents and value is None:  # the section is removed, and so is its step
        del node[last]
    return path
