"""`bench/gpu.py` on stand-ins for the driver and ONNX Runtime's CUDA provider: the measuring, not the speed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from medusa_export.measure.bench.bench_prompts import load_prompts
from medusa_runtime.backends.gpu import ort_cuda
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.text.codec import TextCodec
from tests.support.stand_in_cuda import StandInDriver
from tests.support.stand_in_ort_cuda import StandInOrt

BENCH = Path(__file__).parents[2] / "bench"
Make = Callable[..., Path]


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "REPEATS", 2)
    return module


def test_a_bundle_is_measured(gpu_bench: ModuleType, make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = StandInDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(ort_cuda, "ort", StandInOrt(driver))
    bundle = make_bundle()
    prompts = load_prompts(None, None, TextCodec(bundle))
    found = gpu_bench.measured(bundle, prompts, 12, cuda_graphs=False)
    assert (found["backend"], found["precision"], found["prompts"]) == ("ort-cuda", "fp32", len(prompts))
    assert list(found["step_ms"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert min(found["step_ms"].values()) > 0
    for mode, decoded in found["decoding"].items():
        assert 0 < decoded["host_percent"] < 100
        assert decoded["bytes_down_per_step"] > 0
        assert decoded["num_answers"] == len(prompts)
        if mode != "plain":
            assert found["agreement_with_plain"][mode]["num_equal"] == len(prompts)
            assert found["medusa_over_plain"][mode]["num_prompts"] == len(prompts)
    assert found["memory_bytes"]["cache"] > 0


@pytest.mark.skipif(find_gpus().why_none is None, reason="there is a GPU: it would be measured")
def test_without_a_gpu_it_says_so(make_bundle: Make) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), str(make_bundle())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: there is no GPU to measure on: ")
