"""What docs/serving.md says of flags, paths and fields is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from medusa_export.cli.serve import command
from medusa_serve.app import API, OPEN
from medusa_serve.errors import KINDS, STATUS
from medusa_serve.protocol.openapi import OPERATIONS, describe
from medusa_serve.protocol.sampling import MedusaFields
from medusa_serve.settings import ServerSettings

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_flag_is_told_of_and_exists() -> None:
    flags = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    told = set(re.findall(r"`(--[a-z-]+)", DOCS)) | set(re.findall(r"\s(--[a-z-]+)", DOCS))
    assert told - flags - {"--json"} == set()  # curl's
    own = {f"--{name.replace('_', '-')}" for name in ServerSettings.model_fields} - {"--page"}
    assert own - told == set()


def test_every_path_is_told_of_and_described() -> None:
    here = {route.path.replace("{name:path}", "{name}") for route in (*API, *OPEN)}
    assert {operation.path for operation in OPERATIONS} == here - {"/openapi.json"}
    assert [path for path in here if "{" not in path and path not in DOCS] == []


def test_our_own_fields_are_told_of() -> None:
    table = DOCS.partition("| field | meaning |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", table.replace("`typical`", ""))) == set(MedusaFields.model_fields)


def test_every_status_is_told_of() -> None:
    used = {status for status, _ in STATUS.values()} | set(KINDS) | {404, 408, 413, 415, 422, 500}
    assert [status for status in used if str(status) not in DOCS] == []


def test_the_description_has_no_reference_to_nothing() -> None:
    whole = describe("1")
    schemas = whole["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/(\w+)", str(whole)))
    assert references <= set(schemas)
    assert "$defs" not in str(whole)
