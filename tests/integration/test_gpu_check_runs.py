"""`scripts/gpu_check.sh` for real, on WebGPU: a tiny model, few tokens, one test of tests/gpu, one scheme.

The part `quantised` does all that `webgpu` does, so that one is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.export_options import ExportOptions
from medusa_runtime.backends.webgpu.adapters import find_adapters
from tests.support.models import save_random_heads
from tests.support.software_gpu import settings, why_no_webgpu

ROOT = Path(__file__).parents[2]
TEST = "tests/gpu/test_webgpu.py::test_vulkan_tells_the_limits"
WHY_NOT = why_no_webgpu()
Make = Callable[..., Path]


@pytest.mark.skipif(sys.platform == "darwin", reason="the test that it runs is not for a Mac")
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_machine_is_checked_through_webgpu(make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama", num_hidden_layers=1)
    heads = save_random_heads(model, tmp_path / "heads")
    export_bundle(ExportOptions(str(model), heads, tmp_path / "bundle", precision="fp32"))
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("the quick brown fox\n", encoding="utf-8")
    words = {
        "--bundle": tmp_path / "bundle",
        "--model": model,
        "--heads": heads,
        "--prompts": prompts,
        "--validation-prompts": prompts,
        "--max-new-tokens": 8,
        "--tests": TEST,
        "--scheme": "int4",
        "--work": tmp_path / "work",
        "--output": output,
        "--minutes": 20,  # so that no part is left out on a busy machine
    }
    command = ["sh", ROOT / "scripts/gpu_check.sh", "--system", "--python", sys.executable]
    command += [word for pair in words.items() for word in pair]
    command += [word for part in ("tests", "quantised") for word in ("--part", part)]
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | settings(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"{output}: all passed"
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["summary"] == {"running": None, "failed": [], "out_of_time": []}
    assert report["doctor"]["webgpu_adapters"]
    assert (report["tests"]["passed"], report["tests"]["num_failed"], report["tests"]["skipped"]) == (1, 0, {})
    found = report["quantised"]["int4"]
    assert (found["validation"]["status"], found["validation"]["backend"]) == ("passed", "ort-webgpu")
    measured = found["benchmark"]["webgpu"]
    assert {mode: same["num_equal"] for mode, same in measured["agreement_with_plain"].items()} == {"static": 1, "dynamic": 1}
    assert measured["decoding"]["static"]["tokens_per_step"] >= 1
    is_software = all(adapter.is_software for adapter in find_adapters())
    assert report["is_software"] == (is_software and not report["doctor"]["gpus"])
    assert ("step_ms" in measured) == (not is_software)
    assert ("tokens_per_second" in measured["decoding"]["plain"]) == (not is_software)
