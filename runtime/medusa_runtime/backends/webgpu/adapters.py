"""The GPUs that ONNX Runtime's WebGPU provider offers. It is a plugin: a library that is registered once a process."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

from medusa_runtime.errors import BackendError, MissingExtraError, OptionError, first_line

PROVIDER = "WebGpuExecutionProvider"
REGISTERED_AS = "medusa-webgpu"
ALLOW_SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"  # of the provider: take a driver that computes on the CPU
_lock = threading.Lock()
_state = {"registered": False}


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


def _registered() -> Any:
    """ONNX Runtime, with the provider's library."""
    try:
        import onnxruntime as ort  # noqa: PLC0415 - needs an extra, as the next
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    try:
        import onnxruntime_ep_webgpu  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("onnxruntime-ep-webgpu", "webgpu") from error
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError("the installed ONNX Runtime takes no plugins, so it has no WebGPU; update it")
    with _lock:
        if not _state["registered"]:
            try:
                ort.register_execution_provider_library(REGISTERED_AS, onnxruntime_ep_webgpu.get_library_path())
            except Exception as error:  # ONNX Runtime's errors have no common base but this
                raise BackendError(f"ONNX Runtime cannot load its WebGPU provider: {first_line(error)}") from error
            _state["registered"] = True
    return ort


def _adapter(index: int, device: Any, ort: Any) -> Adapter:
    hardware = device.device
    is_software = hardware.type == ort.OrtHardwareDeviceType.CPU
    described = hardware.metadata.get("Description") or hardware.vendor or "unknown"
    name = f"a software driver ({os.environ.get('VK_DRIVER_FILES', 'Vulkan')})" if is_software else f"{described} GPU"
    return Adapter(index, name, is_software, device)
