"""What must agree before a release: versions, extras, and what the wheel is told to hold."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_documents_name_the_wheel_of_this_version() -> None:
    named = {name: set(re.findall(r"medusa_export-([\d.]+)-py3", text(name))) for name in ("README.md", "docs/edge-guide.md")}
    assert all(versions == {VERSION} for versions in named.values()), named


def test_the_readme_says_what_each_extra_is_for() -> None:
    section = text("README.md").partition("## Install")[2].partition("\n## ")[0]
    told = {word for cell in re.findall(r"`([a-z,]+)`", section) for word in cell.split(",")}
    assert set(PROJECT["project"]["optional-dependencies"]) <= told


def test_the_changelog_begins_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])
    if len(headings) > 1:
        assert headings[1].startswith(f"{VERSION} ")


def test_the_wheel_gets_every_recipe_but_no_heads() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(included) == {f"recipes/{file.name}" for file in (ROOT / "recipes").iterdir() if file.is_file()}
    assert all(place == f"medusa_export/{name}" for name, place in included.items())


def test_what_a_release_installs_is_pinned() -> None:
    pinned = {line.partition("==")[0] for line in text("constraints.txt").splitlines() if "==" in line}
    for extra in ("release", "cpu", "serve"):
        for wanted in PROJECT["project"]["optional-dependencies"][extra]:
            name = re.split(r"[\[>;<=]", wanted)[0]
            assert name == "medusa-export" or name.replace("-", "_") in {one.replace("-", "_") for one in pinned}, name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/gpu.md", "docs/tensorrt.md", "docs/edge-guide.md"])
def test_links_to_sections_lead_somewhere(name: str) -> None:
    here = (ROOT / name).parent
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text(name)):
        headings = re.findall(
            r"^#+ (.+)$", (here / target if target else ROOT / name).read_text(encoding="utf-8"), re.MULTILINE
        )
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{name}: {target}#{anchor}"
