"""A hook of MkDocs: links out of docs/, to files and folders of the repository, lead to pages that show them.

The pages of docs/ are read in the repository as well, so their links are relative and may lead to `../recipes` or `../bench`.
The site has such a file as a page of its own, which shows its text. A link to what does not exist is left alone, and the build
fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
LONGEST = 100_000  # characters of a file that its page shows
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".yaml": "yaml", ".md": "markdown"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make a page of each file and folder of the repository that a page links to."""
    root = Path(config.config_file_path).parent
    targets = set()
    for file in files.documentation_pages():
        text = Path(config.docs_dir, file.src_uri).read_text(encoding="utf-8")
        targets |= {target for match in LINK.finditer(text) if (target := outside(file.src_uri, match["path"], root))}
    for target in sorted(targets):
        page = shown(root / target, target)
        files.append(File.generated(config, page_of(target), content=page, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Let the links lead there."""
    root, here = Path(config.config_file_path).parent, page.file.src_uri

    def mapped(match: re.Match[str]) -> str:
        target = outside(here, match["path"], root)
        if target is None:
            return match[0]
        return f"]({posixpath.relpath(page_of(target), posixpath.dirname(here) or '.')})"

    return LINK.sub(mapped, markdown)


def outside(page: str, link: str, root: Path) -> str | None:
    """The path in the repository to which a page of docs/ links, if it is outside docs/ and exists."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    inside = target == "docs" or target.startswith("docs/")
    return None if inside or target.startswith("..") or not (root / target).exists() else target


def page_of(target: str) -> str:
    """Where the page of a file or folder of the repository is."""
    return f"repository/{target}.md"


def shown(path: Path, target: str) -> str:
    """The page: a file's text, or a folder's names."""
    head = "---\nsearch: {exclude: true}\n---\n"
    if path.is_dir():
        names = "\n".join(f"- `{entry.name}`" for entry in sorted(path.iterdir()) if entry.name != "__pycache__")
        return f"{head}# `{target}`\n\nA folder of the repository:\n\n{names}\n"
    text = path.read_text(encoding="utf-8")
    note = f"\n\nThe first {LONGEST:,} characters of {len(text):,}." if len(text) > LONGEST else ""
    language = LANGUAGES.get(path.suffix, "text")
    return f"{head}# `{target}`\n\nA file of the repository.{note}\n\n~~~~~{language}\n{text[:LONGEST]}\n~~~~~\n"
