"""The imports of production are light."""

from __future__ import annotations

import json
import subprocess
import sys

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
LIGHT = {"annotated_types", "jinja2", "markupsafe", "numpy", "onnxruntime", "pydantic", "pydantic_core", "tokenizers"}
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


def test_the_command_line_helps_without_loading_torch() -> None:
    program = "import sys; from medusa_export.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    assert done.stdout.endswith("False\n")
