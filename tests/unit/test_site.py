"""The documentation builds as a site without a warning, and holds what it should."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import medusa_runtime
from medusa_export.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install -c constraints.txt -e '.[docs]'")
    output = tmp_path_factory.mktemp("site") / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return output


def test_every_command_is_in_the_reference_with_its_options(site: Path) -> None:
    page = (site / "cli.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f'<h2 id="{name}">' not in page] == []
    for words in ("onnx", "heads evaluate", "trt build"):
        command: Any = main
        for word in words.split():
            command = command.get_command(click.Context(command), word)
        section = page.partition(f'id="{words.replace(" ", "-")}">')[2].partition("</table>")[0]
        assert [option for parameter in command.params for option in parameter.opts if option not in section] == []


def test_everything_public_is_in_the_reference(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in medusa_runtime.__all__ if f'id="medusa_runtime.{name}"' not in page] == []


def test_a_link_out_of_docs_leads_to_a_page_that_shows_the_file(site: Path) -> None:
    page = (site / "embedding.html").read_text(encoding="utf-8")
    assert 'href="repository/examples/batch_job.py.html"' in page
    assert "def main" in re.sub("<[^>]+>", "", (site / "repository/examples/batch_job.py.html").read_text(encoding="utf-8"))


def test_llms_txt_has_each_page_with_a_line_about_it(site: Path) -> None:
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# medusa-export"
    entries = [match for line in lines if (match := re.fullmatch(r"- \[(.+)\]\((\S+)\): (\S.*)", line))]
    assert [line for line in lines if line.startswith("- ") and not re.fullmatch(r"- \[.+\]\(\S+\): \S.*", line)] == []
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    told = {match[2].removesuffix(".html").replace("decisions/index", "decisions/README") for match in entries}
    assert told == pages
    assert [match[2] for match in entries if not (site / match[2]).is_file()] == []


def test_no_page_asks_another_machine(site: Path) -> None:
    sources = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:')
    links = re.compile(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:')
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert [page for page, text in pages.items() if sources.search(text) or links.search(text)] == []
