"""Which GPUs there are, and what a device's name means."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from medusa_runtime import BackendError, OptionError, choose_backend
from medusa_runtime.backends import choosing
from medusa_runtime.backends.gpu import devices
from medusa_runtime.backends.gpu.buffers import Layout, Packet
from medusa_runtime.backends.gpu.devices import Gpus, find_gpus, parse_device
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.backends.webgpu.adapters import Adapter
from medusa_runtime.bundle.cpu import device_key
from medusa_runtime.bundle.manifest import EngineFacts, Manifest, QuantizationFacts
from medusa_runtime.errors import CapacityError, DeviceLostError, MissingExtraError
from tests.support.fake_backend import fake_manifest
from tests.support.stand_in_cuda import CUresult, StandInDriver

DRIVER = "cuda.bindings.driver"


def engine_manifest(flavor: str) -> Manifest:
    facts = EngineFacts(
        flavor=flavor, tensorrt_version="1", compute_capabilities=["8.9"], profiles={}, aliases={}, source_bundle=""
    )
    return fake_manifest().model_copy(update={"kind": "tensorrt", "engine": facts})


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StandInDriver:
    driver = StandInDriver()
    monkeypatch.setitem(sys.modules, DRIVER, driver)
    return driver


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("libcuda.so.1 is not there\nmore")

    monkeypatch.setitem(sys.modules, DRIVER, SimpleNamespace(cuInit=fail))


def with_providers(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    library = SimpleNamespace(ort=SimpleNamespace(get_available_providers=lambda: list(names)))
    monkeypatch.setitem(sys.modules, "medusa_runtime.backends.ort_library", library)


@pytest.mark.parametrize(
    ("device", "meaning"),
    [
        ("auto", ("auto", 0)),
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:0", ("cuda", 0)),
        ("cuda:13", ("cuda", 13)),
        ("gpu", ("gpu", 0)),
        ("gpu:1", ("gpu", 1)),
    ],
)
def test_devices_have_names(device: str, meaning: tuple[str, int]) -> None:
    assert parse_device(device) == meaning


@pytest.mark.parametrize("device", ["", "tpu", "cuda:", "cuda:x", "gpu:x", "cuda:-1", "cpu:0", "cuda0"])
def test_other_names_are_refused(device: str) -> None:
    with pytest.raises(OptionError, match=r"^the device is '.*'; there are: auto, cpu, cuda"):
        parse_device(device)


def test_gpus_are_found(driver: StandInDriver) -> None:
    found = find_gpus()
    [gpu] = found.gpus
    assert (gpu.index, gpu.name, gpu.compute_capability, gpu.memory) == (0, "Stand-in GPU", "8.9", driver.memory)
    assert (found.cuda_version, found.why_none) == ("13.2", None)
    assert "cuMemAlloc" not in driver.calls
    assert "cuDevicePrimaryCtxRetain" not in driver.calls


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_driver_it_says_so() -> None:
    assert find_gpus() == Gpus(why_none="there is no NVIDIA driver on this machine", is_absent=True)


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, DRIVER, None)
    monkeypatch.setattr(devices, "has_driver", lambda: False)
    assert find_gpus() == Gpus(why_none="there is no NVIDIA driver on this machine", is_absent=True)
    monkeypatch.setattr(devices, "has_driver", lambda: True)
    assert find_gpus() == Gpus(
        why_none="there is an NVIDIA driver, but nothing here uses it; the extra gpu does, or rtx or trt for engines"
    )
    with pytest.raises(MissingExtraError, match=r"^cuda-bindings is not installed; .*'medusa-export\[cuda\]'$"):
        Gpu()


@pytest.mark.parametrize("has_nvidia", [True, False])
def test_auto_takes_webgpu_where_onnx_runtime_has_no_cuda(has_nvidia, driver: StandInDriver, monkeypatch) -> None:
    if not has_nvidia:
        monkeypatch.setattr(StandInDriver, "_devicegetcount", lambda _: 0)
    with_providers(monkeypatch, "CPUExecutionProvider")
    manifest = fake_manifest()
    found = [
        Adapter(0, "a software driver", is_software=True, device=None),
        Adapter(1, "A GPU", is_software=False, device=None),
    ]
    monkeypatch.setattr(choosing, "find_adapters", lambda: found)
    assert choose_backend(manifest).backend == "ort-cpu"  # the bundle has no graphs for it
    graphs = manifest.graphs | {"step.ort-webgpu": manifest.graphs["step"]}
    placed = choose_backend(manifest.model_copy(update={"graphs": graphs}))
    assert (placed.backend, placed.device) == ("ort-webgpu", "gpu:1")
    assert placed.why.endswith(", and ONNX Runtime cannot use CUDA")
    facts = QuantizationFacts(scheme="int4", activation_bits=8, smoothing=0, quality={})
    placed = choose_backend(manifest.model_copy(update={"graphs": graphs, "quantization": facts}))
    assert placed.backend == "ort-webgpu"
    assert placed.why.endswith(", and CUDA does not run quantised bundles")
    monkeypatch.setattr(choosing, "find_adapters", lambda: found[:1])
    assert choose_backend(manifest.model_copy(update={"graphs": graphs})).backend == "ort-cpu"


def test_the_driver_is_found_by_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(devices.ctypes, "CDLL", asked.append)
    for platform in ("linux", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        assert devices.has_driver()
    assert asked == ["libcuda.so.1", "nvcuda.dll"]

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", absent)
    assert not devices.has_driver()


def test_a_driver_without_a_gpu_is_no_gpu(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInDriver, "_devicegetcount", lambda _: 0)
    assert find_gpus().why_none == "the NVIDIA driver finds no GPU here"
    with pytest.raises(BackendError, match=r"^there is no cuda:0; this machine has 0 GPUs$"):
        Gpu(0)
    monkeypatch.setattr(StandInDriver, "_init", lambda *_: (CUresult.CUDA_ERROR_INVALID_VALUE,))
    assert find_gpus().why_none == "the NVIDIA driver finds no GPU here (CUDA_ERROR_INVALID_VALUE)"


def test_failures_of_the_driver_are_one_line(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(StandInDriver, "_memalloc", lambda *_: (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None))
    with pytest.raises(CapacityError, match=r"^x needs 0.0 KB of GPU memory, 1073.7 MB are free on Stand-in GPU; lower max_b"):
        gpu.allocate(8, "x")
    monkeypatch.setattr(StandInDriver, "_streamsynchronize", lambda *_: (CUresult.CUDA_ERROR_INVALID_VALUE,))
    with pytest.raises(BackendError, match=r"cuStreamSynchronize says CUDA_ERROR_INVALID_VALUE$"):
        gpu.synchronize()
    monkeypatch.setattr(StandInDriver, "_streamsynchronize", lambda *_: (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,))
    with pytest.raises(
        DeviceLostError, match=r"^the GPU is lost to this process, which must be started again: .*_ILLEGAL_ADDRESS$"
    ):
        gpu.synchronize()


def test_a_capture_that_fails_leaves_the_stream_usable(driver: StandInDriver) -> None:
    gpu = Gpu()

    def fail() -> None:
        raise BackendError("no")

    with pytest.raises(BackendError, match=r"^no$"):
        gpu.capture(fail)
    gpu.synchronize()


def test_nothing_is_freed_while_work_is_captured(driver: StandInDriver) -> None:
    gpu = Gpu()
    held = [gpu.allocate(8, "x")]

    def queue() -> None:
        held.clear()
        assert "cuMemFree" not in driver.calls

    gpu.capture(queue)
    assert driver.calls.count("cuMemFree") == 1


def test_an_array_keeps_the_memory_that_it_lies_in(driver: StandInDriver) -> None:
    packet = Packet(Gpu(), "x")
    layout = Layout.of(a=((4,), "int64"))
    packet.reserve(layout.num_bytes)
    array = packet.host(layout.places["a"])
    array[:] = 7
    packet.reserve(9999)
    assert "cuMemFreeHost" not in driver.calls
    assert array.tolist() == [7] * 4
    del array
    assert "cuMemFreeHost" in driver.calls


def test_arrays_of_a_packet_are_aligned_and_apart() -> None:
    layout = Layout.of(a=((3,), "int8"), b=((2, 40), "float64"), c=((1,), "int64"))
    assert [(place.offset, place.shape) for place in layout.places.values()] == [(0, (3,)), (256, (2, 40)), (1024, (1,))]
    assert layout.num_bytes == 1280


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_auto_is_the_cpu() -> None:
    place = choose_backend(fake_manifest())
    assert (place.backend, place.device, place.processor) == ("ort-cpu", "cpu", None)
    assert str(place) == "ort-cpu on cpu (there is no NVIDIA driver on this machine)"


def test_with_a_gpu_auto_is_the_gpu_if_onnx_runtime_can(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    with_providers(monkeypatch, "CUDAExecutionProvider", "CPUExecutionProvider")
    place = choose_backend(fake_manifest())
    assert (place.backend, place.device, place.processor) == ("ort-cuda", "cuda:0", "Stand-in GPU")
    with_providers(monkeypatch, "CPUExecutionProvider")
    place = choose_backend(fake_manifest())
    assert (place.backend, place.device) == ("ort-cpu", "cpu")
    assert "Stand-in GPU, but ONNX Runtime is installed without CUDA" in place.why


def test_quantised_bundles_stay_on_the_cpu(driver: StandInDriver) -> None:
    facts = QuantizationFacts(scheme="int8", activation_bits=16, smoothing=0, source_bundle="", quality={})
    manifest = fake_manifest().model_copy(update={"quantization": facts})
    assert choose_backend(manifest).backend == "ort-cpu"
    on_cuda = r"^ort-cuda does not run quantised bundles \(int8\); use the float bundle"
    on_webgpu = r"^this bundle of the scheme int8 has no graphs for WebGPU; quantize again with --scheme int8-blocks"
    for backend, device, told in (
        ("auto", "cuda:0", on_cuda),
        ("ort-cuda", "auto", on_cuda),
        ("auto", "gpu", on_webgpu),
        ("ort-webgpu", "auto", on_webgpu),
    ):
        with pytest.raises(BackendError, match=told):
            choose_backend(manifest, backend, device)


@pytest.mark.parametrize(("flavor", "backend"), [("rtx", "trt-rtx"), ("tensorrt", "trt")])
def test_engines_run_on_what_built_them(flavor: str, backend: str) -> None:
    manifest = engine_manifest(flavor)
    assert choose_backend(manifest).backend == choose_backend(manifest, backend, "cuda").backend == backend
    assert choose_backend(manifest, device="cuda:2").device == "cuda:2"
    other = "trt" if backend == "trt-rtx" else "trt-rtx"
    with pytest.raises(BackendError, match=f"engines are for {backend}, not {other};"):
        choose_backend(manifest, other)
    for device in ("cpu", "gpu"):
        with pytest.raises(OptionError, match=f"do not run on the device {device}"):
            choose_backend(manifest, device=device)


@pytest.mark.parametrize(
    ("backend", "device", "error", "line"),
    [
        ("tpu", "auto", OptionError, "^the backend is 'tpu'; there are: auto, ort-cpu, ort-cuda, ort-webgpu, trt, trt-rtx$"),
        ("ort-cpu", "cuda", OptionError, "^the backend ort-cpu does not run on the device cuda$"),
        ("ort-cuda", "cpu", OptionError, "^the backend ort-cuda does not run on the device cpu$"),
        ("ort-cuda", "gpu", OptionError, "^the backend ort-cuda does not run on the device gpu$"),
        ("ort-webgpu", "cuda:0", OptionError, "^the backend ort-webgpu does not run on the device cuda:0$"),
        ("trt", "auto", BackendError, "build one with: medusa-export trt --flavor tensorrt$"),
        ("trt-rtx", "auto", BackendError, "build one with: medusa-export trt$"),
    ],
)
def test_contradictions_are_one_line(backend: str, device: str, error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line):
        choose_backend(fake_manifest(), backend, device)


def test_what_is_asked_for_is_taken() -> None:
    assert choose_backend(fake_manifest(), "ort-cuda").device == "cuda:0"
    assert choose_backend(fake_manifest(), "auto", "cuda:1").device == "cuda:1"
    assert choose_backend(fake_manifest(), "auto", "cpu").why == "asked for"


def test_a_gpu_is_named_in_tunings_without_the_cpu() -> None:
    assert device_key("trt", processor="A GPU", num_threads=3) == "trt, A GPU"
