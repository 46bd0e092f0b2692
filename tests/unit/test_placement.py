"""The backend and device that commands choose for a bundle, their messages, and their refusals."""

from __future__ import annotations

import re

import pytest

from medusa_export import placement as placing
from medusa_export.placement import place
from medusa_runtime.backends import choosing
from medusa_runtime.backends.gpu.devices import Gpus
from medusa_runtime.backends.gpu.driver import GpuFacts
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.errors import BackendError, MedusaError, OptionError
from tests.support.fake_backend import fake_manifest

ONE_GPU = Gpus([GpuFacts(0, "A GPU", "8.9", 10**9)], "13.0")
NO_GPU = Gpus(why_none="there is no NVIDIA driver on this machine (none)")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(placing, "note", lines.append)
    return lines


def machine(monkeypatch: pytest.MonkeyPatch, found: Gpus) -> None:
    for module in (placing, choosing):
        monkeypatch.setattr(module, "find_gpus", lambda: found)


@pytest.fixture
def manifest() -> Manifest:
    return fake_manifest()


def test_a_choice_is_told_once_with_its_reason(manifest: Manifest, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, NO_GPU)
    assert place(manifest).backend == "ort-cpu"
    assert told == [f"runs with ort-cpu on cpu ({NO_GPU.why_none})"]
    place(manifest, "ort-cpu")
    place(manifest, tell=False)
    assert len(told) == 1  # what was asked for is not told back


@pytest.mark.parametrize(
    ("gpus", "asked", "error", "message"),
    [
        (ONE_GPU, {"backend": "tpu"}, OptionError, "the backend is 'tpu'; there are: auto, ort-cpu"),
        (ONE_GPU, {"device": "tpu"}, OptionError, "the device is 'tpu'; there are: auto, cpu, cuda"),
        (ONE_GPU, {"backend": "ort-cpu", "device": "cuda"}, OptionError, "ort-cpu does not run on the device cuda"),
        (ONE_GPU, {"backend": "trt-rtx"}, BackendError, "this is an ONNX bundle; build one with: medusa-export trt"),
        (
            ONE_GPU,
            {"device": "cuda", "threads": 2},
            OptionError,
            "--threads is only for the CPU, but the bundle runs on cuda:0",
        ),
        (
            ONE_GPU,
            {"device": "cuda", "spin": "off"},
            OptionError,
            "--spin is only for the CPU, but the bundle runs on cuda:0",
        ),
        (
            NO_GPU,
            {"cuda_graphs": True},
            OptionError,
            "--cuda-graphs is only for CUDA and TensorRT, but the bundle runs with ort-cpu on cpu",
        ),
        (
            NO_GPU,
            {"cuda_graphs": False},
            OptionError,
            "--no-cuda-graphs is only for CUDA and TensorRT, but the bundle runs with ort-cpu on cpu",
        ),
        (NO_GPU, {"device": "cuda:1"}, BackendError, "ort-cuda needs an NVIDIA GPU: there is no NVIDIA driver"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    gpus: Gpus,
    asked: dict[str, object],
    error: type[MedusaError],
    message: str,
    manifest: Manifest,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, gpus)
    with pytest.raises(error, match=re.escape(message)):
        place(manifest, **asked)  # type: ignore[arg-type] # some of its arguments
    assert told == []


def test_what_has_a_meaning_is_accepted(manifest: Manifest, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ONE_GPU)
    assert place(manifest, device="cuda", cuda_graphs=False).device == "cuda:0"
    assert place(manifest, device="cpu", threads=2, spin="off").backend == "ort-cpu"
    assert told == ["runs with ort-cuda on cuda:0 (asked for)", "runs with ort-cpu on cpu (asked for)"]
