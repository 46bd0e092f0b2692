"""The imports of production are light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import medusa_runtime

HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "accelerate",
    "optimum",
    "medusa_export",
    "medusa_heads",
)
LIGHT = {"annotated_types", "numpy", "onnxruntime", "pydantic", "pydantic_core", "tokenizers"}
LIGHT |= {"typing_extensions", "typing_inspection", "medusa_runtime"}
PROGRAM = """
import json, sys
import medusa_runtime
import medusa_runtime.backends.ort_cpu
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))))
"""


def test_importing_the_runtime_loads_what_it_needs_and_nothing_else() -> None:
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout))
    assert {name for name in loaded - LIGHT if not name.startswith(("_", "sitecustomize", "usercustomize"))} == set()
    assert not loaded & set(HEAVY)


def modules(program: str) -> set[str]:
    """The modules, other than Python's own, that a program has loaded at its end."""
    told = "\nimport sys; print(*sorted(set(sys.modules) - set(sys.stdlib_module_names)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program + told], capture_output=True, text=True, check=True)
    return {name for name in done.stderr.split() if name.partition(".")[0] not in sys.stdlib_module_names}


HELP = "from medusa_export.cli import main; main({!r}, standalone_mode=False)"


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_load_click_and_little_else(words: list[str]) -> None:
    loaded = modules(HELP.format(words))
    packages = {name.partition(".")[0] for name in loaded if not name.startswith(("_", "sitecustomize", "usercustomize"))}
    assert packages - {"click", "medusa_export", "medusa_runtime"} == set()
    assert len(loaded) < 60


def test_the_help_of_a_command_loads_no_numpy_and_no_tokenizer() -> None:
    for command in ("onnx", "quantize", "validate", "tune", "distill", "trt", "doctor", "inspect", "diff"):
        loaded = modules(HELP.format([command, "--help"]))
        assert loaded.isdisjoint({"numpy", "torch", "tokenizers", "jinja2", "onnxruntime", "rich", "yaml"}), command


def test_the_runtimes_names_are_imported_when_they_are_used() -> None:
    assert len(modules("import medusa_runtime")) < 5
    loaded = modules("from medusa_runtime import MedusaLM")
    assert loaded.isdisjoint({"jinja2", "onnxruntime"})
    for name in medusa_runtime.__all__:
        assert getattr(medusa_runtime, name) is not None
        assert name in dir(medusa_runtime)
    with pytest.raises(AttributeError, match="module 'medusa_runtime' has no attribute 'Medusa'"):
        medusa_runtime.Medusa  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """The names stand three times in the runtime's `__init__`: for type checkers, for its `__getattr__`, and in `__all__`."""
    tree = ast.parse(Path(medusa_runtime.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == medusa_runtime._PLACES
    assert sorted(seen) == sorted(medusa_runtime.__all__)
