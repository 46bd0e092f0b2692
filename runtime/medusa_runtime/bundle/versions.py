"""The version that each JSON file of ours holds: what is read, what is brought to the newest form, and what is refused."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PACKAGE = "medusa-export"
_RELEASE = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}([a-z.+-][0-9a-z.+-]{0,20})?")  # what a version in a message may look like


@dataclass(frozen=True)
class FileVersions:
    """The versions of one kind of file.

    A version is raised by every change that the program before would refuse or misread, new fields included.
    """

    name: str  # of the field that holds the version
    newest: int  # the version that is written
    steps: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)  # n → makes n + 1 of it

    @property
    def oldest(self) -> int:
        """The oldest version that is read: from there on, every version has a step."""
        return min((self.newest, *self.steps))

    def problem(self, data: Any, again: str) -> str | None:
        """Why a file cannot be read, and what to do, in one line; None if it can be read or does not tell a version.

        Args:
            data: the file's JSON.
            again: how to make such a file again.
        """
        version = data.get(self.name, self.newest) if isinstance(data, dict) else self.newest
        name = self.name.replace("_", " ")
        if type(version) is not int or version < 1:
            return f"it has {name} {version!r:.40}, and a version is a number from 1 on; {again}"
        reads = f"{self.oldest} to {self.newest}" if self.oldest < self.newest else str(self.newest)
        here = f"it has {name} {version}, {_this()} reads {reads}"
        if version < self.oldest:
            return f"{here}; {again}"
        if version > self.newest:
            return f"{here}; {_reader(data)}, or {again}"
        return None

    def migrated(self, data: dict[str, Any]) -> dict[str, Any]:
        """The contents in the newest form. The file stays as it is."""
        for version in range(data.get(self.name, self.newest), self.newest):
            data = self.steps[version](data) | {self.name: version + 1}
        return data


def _reader(data: dict[str, Any]) -> str:
    """How to get a program that reads a newer file: the newest of those that wrote into it does."""
    makers = [version for version in map(_maker, _entries(data)) if version]
    if not makers:
        return f"read it with a later {PACKAGE}"
    return f"read it with {PACKAGE} {max(makers, key=_numbers)}, which made it, or a later one"


def _entries(data: dict[str, Any]) -> list[Any]:
    """What can have a provenance: the file, or each of its devices or steps."""
    parts = [data.get(name) for name in ("devices", "steps")]
    return [data, *(entry for part in parts if isinstance(part, dict) for entry in part.values())]


def _maker(entry: Any) -> str | None:
    for name in ("provenance", "versions", PACKAGE):
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry if isinstance(entry, str) and _RELEASE.fullmatch(entry) else None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _this() -> str:
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:  # the runtime's modules alone
        return f"this {PACKAGE}"
