"""The steps that a run of a recipe has done, in `recipe.json` in its output, so that the same command continues the run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from medusa_heads.directories import alone_in
from medusa_heads.distill.store import ANSWERS_NAME
from medusa_heads.formats import native
from medusa_runtime.bundle.files import read_json, write_whole
from medusa_runtime.bundle.manifest import MANIFEST_NAME, Manifest, Provenance, sha256_of
from medusa_runtime.bundle.versions import FileVersions
from medusa_runtime.errors import OptionError

STATE_NAME = "recipe.json"
VERSIONS = FileVersions("format_version", newest=1)


class StepRecord(BaseModel):
    """A finished step."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    inputs: dict[str, str] = Field(description="SHA-256 of each input, by name")
    seconds: float
    provenance: Provenance


class RunState(BaseModel):
    """The contents of `recipe.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = VERSIONS.newest
    recipe: str
    steps: dict[str, StepRecord] = Field(default_factory=dict)

    def save(self, output: Path) -> None:
        """Write the file whole or not at all."""
        write_whole(output / STATE_NAME, self.model_dump_json(indent=2) + "\n")


@contextmanager
def opened(output: Path, recipe: str) -> Iterator[RunState]:
    """The state of an output directory, locked against other runs. A missing directory is created.

    Raises:
        OptionError: the directory has other files in it or belongs to another recipe, or another run uses it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OptionError(f"{output} is not a directory; choose another --output") from error
    with alone_in(output):
        yield _read(output, recipe)


def fingerprint(place: str) -> str:
    """SHA-256 of an input of a step: of the files that matter for the step, or of the id if it is on a hub."""
    path = Path(place)
    if not path.exists():
        return hashlib.sha256(place.encode()).hexdigest()
    if (path / MANIFEST_NAME).is_file():
        files = {name: facts.sha256 for name, facts in Manifest.load(path).files.items()}
    else:
        files = {part.name: _sha256(part, part.stat().st_size, part.stat().st_mtime_ns) for part in _parts(path)}
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def _parts(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # Training data or heads: other files in these directories only describe their run.
    for names, more in (((ANSWERS_NAME,), ()), (native.FILES, native.EXPORTED)):
        if all((path / name).is_file() for name in names):
            return [path / name for name in (*names, *more) if (path / name).is_file()]
    return [part for part in path.iterdir() if part.is_file()]


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:  # noqa: ARG001 - size and time are part of the cache key
    return sha256_of(path)


def _read(output: Path, recipe: str) -> RunState:
    place = output / STATE_NAME
    if not place.exists():
        if any(not entry.name.startswith(f".{STATE_NAME}.") for entry in output.iterdir()):
            raise OptionError(f"{output} has files in it that no recipe made; choose another --output")
        state = RunState(recipe=recipe)
        state.save(output)
        return state
    try:
        data = read_json(place)
        if problem := VERSIONS.problem(data, "choose another --output"):
            raise OptionError(f"{place} cannot be read: {problem}")
        state = RunState.model_validate(data)
    except ValueError as error:
        raise OptionError(f"{place} is damaged; choose another --output, or delete it to run all steps again") from error
    if state.recipe != recipe:
        raise OptionError(f"{output} belongs to the recipe {state.recipe}; choose another --output")
    return state
