"""A hook of MkDocs: every decision record is in the navigation, under its own title, without being listed by hand."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the records to the section of decisions."""
    [section] = [item for item in config.nav or () if "Decisions" in item]
    section["Decisions"] += [{title(path): f"decisions/{path.name}"} for path in records(Path(config.docs_dir))]
    return config


def records(docs: Path) -> list[Path]:
    """The decision records, in their order."""
    return sorted((docs / "decisions").glob("[0-9]*.md"))


def title(path: Path) -> str:
    """A record's title: its first heading."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
