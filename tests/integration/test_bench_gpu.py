"""`bench/gpu.py` on stand-ins for the driver and ONNX Runtime's CUDA provider: the measuring, not the speed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

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


def test_what_is_measured_is_written_at_once(
    gpu_bench: ModuleType, make_bundle: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle, output = make_bundle(), tmp_path / "out.json"
    seen: list[dict[str, Any]] = []

    def beside(words: list[str]) -> dict[str, Any]:
        seen.append(json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {})
        return {"words": words[1:]}

    def in_pytorch(*_: object, compiled: bool) -> dict[str, Any]:
        return {"compiled": compiled}

    monkeypatch.setattr(gpu_bench, "beside", beside)
    monkeypatch.setattr(gpu_bench, "in_pytorch", in_pytorch)
    monkeypatch.setattr(gpu_bench, "require_gpu", lambda _: None)
    own = ["--max-new-tokens", "9", "--device"]
    run = partial(CliRunner().invoke, gpu_bench.main, catch_exceptions=False)
    run([str(bundle), "--max-new-tokens", "9", "-o", str(output)])
    first = {"words": [*own, "cuda", "--cuda-graphs"]}
    assert seen == [{}, {bundle.name: {"cuda-graphs": first}}]
    run([str(bundle), "--max-new-tokens", "9", "--device", "gpu", "-o", str(output)])
    assert json.loads(output.read_text(encoding="utf-8"))["runs"] == {bundle.name: {"webgpu": {"words": [*own, "gpu"]}}}
    run([str(bundle), "--measure", "compiled", "--checkpoint", str(bundle), "--heads", str(bundle), "-o", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert (found["runs"], found["pytorch"]) == ({}, {"fp32 compiled": {"compiled": True}})
    assert len(seen) == 3


@pytest.mark.skipif(find_gpus().why_none is None, reason="there is a GPU: it would be measured")
def test_without_a_gpu_it_says_so(make_bundle: Make) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), str(make_bundle())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: there is no GPU to measure on: ")
