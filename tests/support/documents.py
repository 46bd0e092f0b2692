"""The documentation's commands: which there are, and which of them no test runs, with the reason.

A block of commands is fenced as `console`; its lines that begin with `$ ` are commands, the others what they print. A comment
right before the block tells that no test runs it, or those of its commands that begin with a text:

    <!-- not-run gpu: an engine runs on the GPU that it was built for -->
    <!-- not-run network "pip": packages come from an index -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.joinpath("docs").rglob("*.md")),
    *sorted(ROOT.joinpath("recipes").rglob("*.md")),
)
KINDS = {
    "gpu": "it needs a GPU",
    "cluster": "it needs a cluster",
    "network": "it fetches from the network",
    "software": "it needs other software",
    "time": "it takes long",
}
FENCE = re.compile(
    r"^(?P<before>(?:<!--(?:(?!-->).)*-->\n)*)```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r'<!-- not-run (?P<kind>\w+)(?: "(?P<begin>[^"]+)")?: (?P<reason>(?:(?!-->).)+) -->', re.DOTALL)


@dataclass(frozen=True)
class Mark:
    """That no test runs a command, and why."""

    kind: str
    begin: str  # of the commands that it is about; empty for all of the block
    reason: str


@dataclass(frozen=True)
class Command:
    """A command in a page, and what it prints there."""

    page: Path
    line: int
    text: str  # in one line, comment included
    printed: tuple[str, ...] = ()
    mark: Mark | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line
    language: str
    text: str
    marks: tuple[Mark, ...]

    def commands(self) -> list[Command]:
        """Its commands in order; one that ends in a backslash goes on in the next line."""
        found: list[tuple[int, str, list[str]]] = []
        continued = False
        for number, line in enumerate(self.text.splitlines(), self.line):
            if continued:
                place, text, printed = found[-1]
                found[-1] = (place, text.removesuffix("\\") + line.strip(), printed)
            elif line.startswith("$ "):
                found.append((number, line.removeprefix("$ "), []))
            elif found:
                found[-1][2].append(line)
            continued = line.endswith("\\")
        return [Command(self.page, place, text, tuple(printed), self.mark_of(text)) for place, text, printed in found]

    def mark_of(self, text: str) -> Mark | None:
        return next((mark for mark in self.marks if text.startswith(mark.begin)), None)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: match.start("text")].count("\n") + 1,
            match["language"],
            match["text"],
            tuple(Mark(mark["kind"], mark["begin"] or "", mark["reason"]) for mark in MARK.finditer(match["before"])),
        )
        for match in FENCE.finditer(text)
    ]


def commands(page: Path) -> list[Command]:
    """The commands of a page, in order."""
    return [command for block in blocks(page) if block.language == "console" for command in block.commands()]


PAGES_THAT_RUN = tuple(page for page in PAGES if page != TUTORIAL and any(command.mark is None for command in commands(page)))
