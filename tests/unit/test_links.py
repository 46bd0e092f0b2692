"""Links of README and of the pages lead to files of the repository, where they are read as well as on the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documents import PAGES, ROOT

LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
DECISIONS = ROOT / "docs" / "decisions"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_the_decisions_have_an_index() -> None:
    records = sorted(DECISIONS.glob("[0-9]*.md"))
    titles = [record.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").split(". ", 1) for record in records]
    rows = [f"| {number} | [{title}]({record.name}) |" for (number, title), record in zip(titles, records, strict=True)]
    index = (DECISIONS / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in index if re.match(r"\| \d", line)] == rows
