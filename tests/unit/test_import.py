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
PROGRAM = f"""
import json, sys, time
started = time.process_time()
import medusa_runtime
seconds = time.process_time() - started
from medusa_runtime import MedusaLM
import medusa_runtime.backends.ort_cpu
print(json.dumps([seconds, sorted(set(sys.modules) & set({HEAVY!r}))]))
"""


def test_importing_the_runtime_is_quick_and_needs_no_torch() -> None:
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout) for _ in range(3)
    ]
    assert runs[0][1] == []
    assert min(seconds for seconds, _ in runs) < 0.5


def test_the_command_line_helps_without_loading_torch() -> None:
    program = "import sys; from medusa_export.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    assert done.stdout.endswith("False\n")
