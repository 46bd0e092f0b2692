"""Engines that do not fit the machine are refused before TensorRT sees them; the message names both sides and the remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_runtime import BackendError, BundleError, Manifest, MedusaLM, OptionError
from medusa_runtime.bundle.manifest import RUNTIME_CACHE
from tests.gpu.here import GPUS, a_gpus, on_each_engine, on_each_with_cuda

pytestmark = a_gpus
Make = Callable[..., Path]


@pytest.fixture
def engines(backend: str, bundle_for: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_for(backend), tmp_path / "engines"))


@on_each_engine
def test_engines_for_another_gpu(backend: str, engines: Path) -> None:
    manifest = Manifest.load(engines)
    assert manifest.engine is not None
    manifest.engine.compute_capabilities = ["6.1"]
    manifest.save(engines)
    own = GPUS.gpus[0].compute_capability
    with pytest.raises(BackendError, match=rf"built for GPUs of compute capability 6\.1, this one has {own}"):
        MedusaLM.from_bundle(engines)


@on_each_engine
def test_engines_of_another_version(backend: str, engines: Path) -> None:
    manifest = Manifest.load(engines)
    assert manifest.engine is not None
    manifest.engine.tensorrt_version = "1.0.0.1"
    manifest.save(engines)
    with pytest.raises(BackendError, match=r"was built with TensorRT\S* 1\.0\.0\.1, this machine has "):
        MedusaLM.from_bundle(engines)


@on_each_engine
def test_a_truncated_engine(backend: str, engines: Path) -> None:
    plan = engines / "step.plan"
    with plan.open("r+b") as file:
        file.truncate(plan.stat().st_size // 2)
    with pytest.raises(BundleError, match=r"step\.plan"):
        MedusaLM.from_bundle(engines)
    with pytest.raises(BundleError, match=r"step\.plan"):
        MedusaLM.from_bundle(engines, verify_files=False)


@on_each_engine
def test_engines_run_on_no_other_backend_and_on_no_cpu(backend: str, engines: Path) -> None:
    with pytest.raises(BackendError, match=f"this bundle's engines are for {backend}, not ort-cuda"):
        MedusaLM.from_bundle(engines, "ort-cuda")
    with pytest.raises(OptionError, match="do not run on the device cpu"):
        MedusaLM.from_bundle(engines, device="cpu")


@on_each_with_cuda
def test_a_gpu_that_is_not_there(backend: str, bundle_for: Make) -> None:
    with pytest.raises(BackendError, match=f"there is no cuda:99; this machine has {len(GPUS.gpus)} GPU"):
        MedusaLM.from_bundle(bundle_for(backend), backend, device="cuda:99")


@on_each_engine
def test_what_tensorrt_rtx_compiled_is_kept_and_read_again(backend: str, engines: Path) -> None:
    cached = engines / RUNTIME_CACHE.format(GPUS.gpus[0].compute_capability.replace(".", ""))
    with MedusaLM.from_bundle(engines, backend) as lm:
        first = lm.generate("dog", max_new_tokens=20).token_ids
    assert cached.exists() == (backend == "trt-rtx")
    with MedusaLM.from_bundle(engines, backend) as lm:  # the digests of its files still fit
        assert lm.generate("dog", max_new_tokens=20).token_ids == first
    if backend == "trt-rtx":
        cached.write_bytes(b"damaged")
        with MedusaLM.from_bundle(engines, backend) as lm:
            assert lm.generate("dog", max_new_tokens=20).token_ids == first
