"""A hook of MkDocs: `llms.txt` (llmstxt.org), the site's pages with a line about each, for programs that read it."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page

LONGEST = 240  # characters of a description
PASSED_BY = re.compile(r"<!--.*?-->|^```.*?^```", re.MULTILINE | re.DOTALL)


def on_nav(nav: Navigation, config: MkDocsConfig, **_: object) -> Navigation:
    """Remember the navigation; the pages have no text yet."""
    config.extra["llms_nav"] = nav
    return nav


def on_post_build(config: MkDocsConfig) -> None:
    """Write the file."""
    Path(config.site_dir, "llms.txt").write_text(listing(config.extra["llms_nav"], config), encoding="utf-8")


def listing(nav: Navigation, config: MkDocsConfig) -> str:
    """The whole file: the site's title, and its sections."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for item in nav.items:
        if isinstance(item, Page):
            lines.append(entry(item))
        elif isinstance(item, Section):
            lines += ["", f"## {item.title}", "", *[entry(page) for page in item.children if isinstance(page, Page)]]
    return "\n".join(lines) + "\n"


def entry(page: Page) -> str:
    """A page's line: title, link, and what it is about."""
    about = description(page.markdown or "")
    return f"- [{page.title}]({page.canonical_url or page.url})" + (f": {about}" if about else "")


def description(markdown: str) -> str:
    """The first sentences of a page's first paragraph, without markup."""
    for block in re.split(r"\n\s*\n", PASSED_BY.sub("", markdown)):
        if re.match(r"\w|\*\*|`|\[", block.strip()):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(block.split())).replace("*", "").replace("`", "")
            return shortened(text)
    return ""


def shortened(text: str) -> str:
    """As many whole sentences as fit, one at least."""
    first, *others = re.split(r"(?<=[.:!?])\s+(?=[A-Z])", text)
    for sentence in others:
        if len(first) + 1 + len(sentence) > LONGEST:
            break
        first += f" {sentence}"
    return first
