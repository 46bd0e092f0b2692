"""Finds recipes: those that come with the package, and the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import medusa_export
from medusa_export.recipe.schema import Recipe, RecipeError, parse
from medusa_runtime.errors import OptionError

ENDINGS = {".yaml", ".yml"}


def folder() -> Path:
    """The folder of the recipes that come with the package: inside the installed package, else in the checkout."""
    package = Path(medusa_export.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def shipped() -> list[Path]:
    """The recipes that come with the package."""
    return sorted(folder().glob("*.yaml"), key=lambda path: path.stem)


def find(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: the name of a recipe that comes with the package, or the path of a YAML file.

    Raises:
        OptionError: there is no such recipe.
    """
    path = Path(name)
    if path.suffix in ENDINGS or len(path.parts) > 1:
        if not path.is_file():
            raise OptionError(
                f"there is no recipe at {name}; recipes with a name: {', '.join(known.stem for known in shipped())}"
            )
        return path
    names = {known.stem: known for known in shipped()}
    if name not in names:
        raise OptionError(f"there is no recipe {name!r}; use one of {', '.join(names)}, or the path of a YAML file")
    return names[name]


def text_of(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        OptionError: the file is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"{shown(path)} is not UTF-8 text") from error


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe's file.

    Args:
        path: the recipe's file.
        overrides: `section.field=value`, see `parse`.

    Raises:
        RecipeError: the file or an override is wrong.
    """
    recipe = parse(text_of(path), shown(path), overrides)
    if path.resolve().parent == folder().resolve() and recipe.name != path.stem:
        raise RecipeError([f"{shown(path)}: name: must be the file's name without its ending, found {recipe.name!r}"])
    return recipe


def shown(path: Path) -> str:
    """A path for messages: relative to the current directory if it lies inside it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
