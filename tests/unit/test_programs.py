"""Programs beside the packages import what exists: most need a GPU or an hour, so no other test runs them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path for room in ("bench", "examples", "scripts") for path in (ROOT / room).rglob("*.py"))
OURS = ("medusa_export", "medusa_runtime", "medusa_heads", "medusa_serve", "tests")


@pytest.mark.parametrize("program", PROGRAMS, ids=[str(path.relative_to(ROOT)) for path in PROGRAMS])
def test_what_a_program_imports_of_ours_exists(program: Path) -> None:
    for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in OURS:
            continue
        assert node.module is not None
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            found = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}") is not None
            assert found, f"{node.module} has no {name}"


def test_the_exporters_files_can_be_found_by_their_names() -> None:
    files = [path for path in (ROOT / "exporter").rglob("*.py") if not path.name.startswith("__")]
    assert len({path.name for path in files}) == len(files) > 100


def test_the_readmes_speeds_are_those_that_were_measured() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "bench/readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert program.present(program.README.read_text(encoding="utf-8")) == program.table(), (
        "python bench/readme_table.py --write"
    )
