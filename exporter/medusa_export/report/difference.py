"""How two bundles differ: their facts, value by value, and their files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medusa_export.report.bundle_report import BundleReport, as_data

NOT_COMPARED = ("bundle", "files", "digest", "problems")  # said otherwise, or of no use
RECORDS = ("provenance", "validation", "tuning")  # of how a bundle was made and judged: two of the same content may differ here


class Change(BaseModel):
    """A fact that differs. One that a bundle does not have is omitted."""

    fact: str = Field(description="the names down to it, with dots")
    first: Any = None
    second: Any = None


class FileChange(BaseModel):
    """A file that differs, or that only one bundle has."""

    file: str
    first_size: int | None = Field(None, description="in bytes; omitted: not in the first")
    second_size: int | None = Field(None, description="in bytes; omitted: not in the second")


class Difference(BaseModel):
    """How two bundles differ."""

    first: str
    second: str
    same_content: bool = Field(description="whether all files have the same digests, and no fact but records differs")
    facts: list[Change]
    records: list[Change] = Field(description="facts of how the bundles were made and judged")
    files: list[FileChange]


def difference(first: BundleReport, second: BundleReport) -> Difference:
    """Compare the facts of two bundles, and the digests in their manifests."""
    ours, theirs = (
        {name: value for name, value in as_data(report).items() if name not in NOT_COMPARED} for report in (first, second)
    )
    changes = list(_changes(ours, theirs))
    facts = [change for change in changes if change.fact.partition(".")[0] not in RECORDS]
    files = list(_file_changes(first, second))
    return Difference(
        first=first.bundle,
        second=second.bundle,
        same_content=not facts and not files,
        facts=facts,
        records=[change for change in changes if change not in facts],
        files=files,
    )


def _changes(first: Any, second: Any, *path: str) -> Iterator[Change]:
    if isinstance(first, dict) or isinstance(second, dict):
        ours, theirs = first or {}, second or {}  # a section that one bundle does not have
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            yield from _changes(ours.get(name), theirs.get(name), *path, name)
    elif first != second:
        yield Change(fact=".".join(path), first=first, second=second)


def _file_changes(first: BundleReport, second: BundleReport) -> Iterator[FileChange]:
    for name in [*first.files, *(name for name in second.files if name not in first.files)]:
        ours, theirs = first.files.get(name), second.files.get(name)
        if (ours and ours.sha256) != (theirs and theirs.sha256):  # reports of validation and tuning have none
            yield FileChange(file=name, first_size=ours.size if ours else None, second_size=theirs.size if theirs else None)


def show(found: Difference, console: Console) -> None:
    """Print what differs as tables, and at the end whether the content is the same."""
    for title, changes in (("facts", found.facts), ("how they were made and judged", found.records)):
        if changes:
            table = Table("", escape(found.first), escape(found.second), title=title, title_justify="left")
            for change in changes:
                table.add_row(*map(escape, (change.fact, _shown(change.first), _shown(change.second))))
            console.print(table)
    if found.files:
        names = [f"{escape(name)}, MB" for name in (found.first, found.second)]
        table = Table("file", *names, title="files", title_justify="left")
        for file in found.files:
            table.add_row(escape(file.file), _size(file.first_size), _size(file.second_size))
        console.print(table)
    console.print("the content is the same" if found.same_content else "the content differs")


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
