"""The GPUs that ONNX Runtime's WebGPU provider offers. It is a plugin: a library that is registered once a process."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any, TypeVar

from medusa_runtime.backends.forks import kept_in_children
from medusa_runtime.bundle.manifest import ORT_WEBGPU, STEP, Manifest
from medusa_runtime.errors import BackendError, MissingExtraError, OptionError, first_line

PROVIDER = "WebGpuExecutionProvider"
REGISTERED_AS = "medusa-webgpu"
ALLOW_SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"  # of the provider: take a driver that computes on the CPU
PRECISIONS = ("fp32", "fp16")
T = TypeVar("T")
_lock = threading.Lock()
_state = {"registered": False, "lost": False}
_held: weakref.WeakSet[Any] = weakref.WeakSet()  # ONNX Runtime's objects that live on the device


@dataclass(frozen=True)
class Adapter:
    """A GPU, or a software driver that stands for one."""

    index: int
    name: str
    is_software: bool
    device: Any  # onnxruntime's OrtEpDevice


def find_adapters() -> list[Adapter]:
    """The adapters of this machine, in the provider's order. None of them is opened.

    Raises:
        MissingExtraError: the provider's package is not installed.
        BackendError: its library cannot be loaded.
    """
    ort = _registered()
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return [_adapter(index, device, ort) for index, device in enumerate(found)]


def choose_adapter(index: int) -> Adapter:
    """One of the adapters.

    Raises:
        OptionError: there are fewer.
        BackendError: there is none.
        MissingExtraError: the provider's package is not installed.
    """
    found = find_adapters()
    if not found:
        raise BackendError(
            "WebGPU finds no GPU here; it needs a driver for Vulkan, Metal or Direct3D 12 "
            f"(for tests, {ALLOW_SOFTWARE}=1 allows a driver in software)"
        )
    if index >= len(found):
        raise OptionError(f"the device is gpu:{index}, but WebGPU finds {len(found)} here, from gpu:0 on")
    return found[index]


def require_graphs(manifest: Manifest) -> None:
    """Refuse a bundle that WebGPU cannot run.

    Raises:
        BackendError: it has no graphs for WebGPU.
    """
    if manifest.precision not in PRECISIONS:
        raise BackendError(f"{ORT_WEBGPU} does not run a bundle in {manifest.precision}; use one in fp32 or fp16")
    if f"{STEP}.{ORT_WEBGPU}" in manifest.graphs:
        return
    if manifest.quantization is not None:
        raise BackendError(
            f"this bundle of the scheme {manifest.quantization.scheme} has no graphs for WebGPU; "
            "quantize again with --scheme int8-blocks, int4 or int8-int4 (experts stay in fp32 or fp16 there)"
        )
    raise BackendError("this bundle has no graphs for WebGPU; export it again")


def held(value: T) -> T:
    """Note an object of ONNX Runtime that lives on the device: the library must not be unloaded before it is gone."""
    _held.add(value)
    return kept_in_children(value)


def note_loss() -> None:
    """The device was lost. The next to ask for adapters gets a new one, if nothing is left on the lost one."""
    with _lock:
        _state["lost"] = True


def _registered() -> Any:
    """ONNX Runtime, with the provider's library."""
    try:
        from medusa_runtime.backends.ort_library import ort  # noqa: PLC0415 - needs an extra, as the next
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    try:
        import onnxruntime_ep_webgpu  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("onnxruntime-ep-webgpu", "webgpu") from error
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError("the installed ONNX Runtime takes no plugins, so it has no WebGPU; update it")
    with _lock:
        if _state["lost"]:
            _unregister(ort)
        if not _state["registered"]:
            try:
                ort.register_execution_provider_library(REGISTERED_AS, onnxruntime_ep_webgpu.get_library_path())
            except Exception as error:  # ONNX Runtime's errors have no common base but this
                raise BackendError(f"ONNX Runtime cannot load its WebGPU provider: {first_line(error)}") from error
            _state["registered"] = True
    return ort


def _unregister(ort: Any) -> None:
    """Unload the provider's library, which keeps a lost device as long as it is loaded."""
    gc.collect()  # models are in cycles
    if len(_held):
        raise BackendError("WebGPU's device was lost; close every model of this process that uses it, then open one again")
    if _state["registered"]:
        ort.unregister_execution_provider_library(REGISTERED_AS)
    _state["registered"] = _state["lost"] = False


def _adapter(index: int, device: Any, ort: Any) -> Adapter:
    hardware = device.device
    is_software = hardware.type == ort.OrtHardwareDeviceType.CPU
    described = hardware.metadata.get("Description") or hardware.vendor or "unknown"
    name = f"a software driver ({os.environ.get('VK_DRIVER_FILES', 'Vulkan')})" if is_software else f"{described} GPU"
    return Adapter(index, name, is_software, device)
