"""The tests of tests/gpu for NVIDIA's GPUs: they pass on stand-ins, and are skipped with the reason elsewhere.

Those for WebGPU run on any machine with its driver in software.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medusa_runtime.backends.gpu.devices import find_gpus

ROOT = Path(__file__).parents[2]


def pytest_on_gpu_tests(*words: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_they_pass_on_stand_ins() -> None:
    chosen = "not bf16 and not fp16 and not real and not thousand and not webgpu"
    lines = pytest_on_gpu_tests("-p", "tests.support.stand_in_machine", "-k", chosen)
    assert " passed" in lines[-1]
    assert "skipped" not in lines[-1]


@pytest.mark.skipif(find_gpus().why_none is None, reason="there is a GPU")
def test_without_a_gpu_they_say_why_they_are_skipped() -> None:
    why = find_gpus().why_none
    assert why is not None
    lines = pytest_on_gpu_tests("-k", "not webgpu")
    assert "passed" not in lines[-1]
    skips = [line for line in lines if line.startswith("SKIPPED")]
    assert len(skips) > 10
    assert all(why in line for line in skips)
