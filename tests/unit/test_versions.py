"""Versions of our JSON files: older ones become the newest form, newer ones are refused with the program that reads them."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest

from medusa_export.recipe.recipe_state import STATE_NAME, opened
from medusa_runtime import OptionError
from medusa_runtime.bundle.versions import FileVersions

AGAIN = "make it again"
THREE = FileVersions(
    "format_version",
    newest=4,
    steps={
        2: lambda data: {"name": data["nickname"], "format_version": 2},
        3: lambda data: data | {"colour": "none"},
    },
)
HERE = f"medusa-export {importlib.metadata.version('medusa-export')}"


def made_by(version: object) -> dict[str, Any]:
    return {"provenance": {"versions": {"medusa-export": version}}}


def test_an_old_file_goes_through_all_steps_in_order() -> None:
    old = {"format_version": 2, "nickname": "x"}
    assert THREE.problem(old, AGAIN) is None
    assert THREE.migrated(old) == {"format_version": 4, "name": "x", "colour": "none"}
    assert old == {"format_version": 2, "nickname": "x"}
    newest = {"format_version": 4, "name": "y"}
    assert THREE.migrated(newest) == newest


def test_a_file_without_a_version_is_taken_for_one_of_the_newest_form() -> None:
    assert THREE.problem({}, AGAIN) is None
    assert THREE.migrated({"name": "x"}) == {"name": "x"}


def test_a_file_older_than_the_first_step_is_refused_with_what_to_do() -> None:
    assert THREE.problem({"format_version": 1}, AGAIN) == f"it has format version 1, {HERE} reads 2 to 4; make it again"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (made_by("0.9"), "medusa-export 0.9, which made it, or a later one, or make it again"),
        ({"devices": {"a": made_by("0.9.2"), "b": made_by("0.10.0"), "c": 1}}, "medusa-export 0.10.0, which made it"),
        ({"steps": {"train": made_by("1.0rc1")}}, "medusa-export 1.0rc1, which made it"),
        (made_by("1; rm -rf /"), "a later medusa-export, or make it again"),
        (made_by(["1"]), "a later medusa-export"),
        ({"provenance": []}, "a later medusa-export"),
        ({}, "a later medusa-export"),
    ],
)
def test_a_newer_file_names_the_newest_program_that_wrote_it(more: dict[str, Any], told: str) -> None:
    problem = THREE.problem({"format_version": 5} | more, AGAIN)
    assert problem is not None
    assert problem.startswith(f"it has format version 5, {HERE} reads 2 to 4; read it with {told}")


@pytest.mark.parametrize("version", [0, -1, 1.0, True, "2", None, [2]])
def test_what_is_no_version_is_told_as_such(version: object) -> None:
    problem = THREE.problem({"format_version": version}, AGAIN)
    assert problem == f"it has format version {version!r}, and a version is a number from 1 on; make it again"


def test_the_modules_alone_have_no_version_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    problem = FileVersions("schema_version", newest=1).problem({"schema_version": 2}, AGAIN)
    assert (
        problem == "it has schema version 2, this medusa-export reads 1; read it with a later medusa-export, or make it again"
    )


def test_a_recipes_run_of_a_newer_program_is_not_continued(tmp_path: Any) -> None:
    with opened(tmp_path / "run", "mine"):
        pass
    place = tmp_path / "run" / STATE_NAME
    place.write_text(place.read_text().replace('"format_version": 1', '"format_version": 2'))
    told = r"recipe\.json cannot be read: it has format version 2, .*choose another --output"
    with pytest.raises(OptionError, match=told), opened(tmp_path / "run", "mine"):
        pass


def test_heads_of_a_newer_program_are_refused(tmp_path: Any) -> None:
    pytest.importorskip("torch")
    from medusa_heads.errors import CheckpointError
    from medusa_heads.formats import native

    (tmp_path / native.CONFIG_NAME).write_text('{"format_version": 2, "shape_of_tomorrow": "x"}')
    with pytest.raises(
        CheckpointError, match=r"cannot be read: it has format version 2, .* reads 1; .*train or convert the heads"
    ):
        native.load(tmp_path)


def test_training_data_of_a_newer_program_names_it(tmp_path: Any) -> None:
    from medusa_heads.distill.store import FACTS_NAME, read_facts

    (tmp_path / FACTS_NAME).write_text(json.dumps({"format_version": 2} | made_by("9.1")))
    with pytest.raises(
        OptionError, match=r"it has format version 2, .* reads 1; read it with medusa-export 9\.1, which made it"
    ):
        read_facts(tmp_path)
