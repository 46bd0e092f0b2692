"""The GPUs of this machine, and the names by which users choose a device."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from medusa_runtime.backends.gpu.driver import NO_DRIVER, Driver, GpuFacts, NoGpuError
from medusa_runtime.errors import BackendError, MissingExtraError, OptionError

NO_PACKAGE = "there is an NVIDIA driver, but nothing here uses it; the extra gpu does, or rtx or trt for engines"


@dataclass(frozen=True)
class Gpus:
    """The NVIDIA GPUs of this machine, or why none can be used."""

    gpus: list[GpuFacts] = field(default_factory=list)
    cuda_version: str | None = None  # the newest that the driver supports
    why_none: str | None = None
    is_absent: bool = False  # there is no driver or no GPU, so no package helps


def find_gpus() -> Gpus:
    """Look for GPUs, without using any of them."""
    try:
        driver = Driver()
        gpus = driver.gpus()
        return Gpus(gpus, driver.version, None if gpus else "the NVIDIA driver finds no GPU here", is_absent=not gpus)
    except MissingExtraError:
        return Gpus(why_none=NO_PACKAGE) if has_driver() else Gpus(why_none=NO_DRIVER, is_absent=True)
    except NoGpuError as error:
        return Gpus(why_none=str(error), is_absent=True)
    except BackendError as error:
        return Gpus(why_none=str(error))


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed. This needs none of the packages that use it."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def parse_device(device: str) -> tuple[str, int]:
    """The kind and the index that a device's name means: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``gpu`` or ``gpu:1``.

    ``cuda`` is an NVIDIA GPU through CUDA, ``gpu`` is any GPU through WebGPU.

    Raises:
        OptionError: it is something else.
    """
    kind, colon, index = str(device).partition(":")
    if kind in ("cuda", "gpu") and (index.isdecimal() if colon else True):
        return kind, int(index or 0)
    if device not in ("auto", "cpu"):
        raise OptionError(f"the device is {device!r}; there are: auto, cpu, cuda, cuda:1 … (CUDA), gpu, gpu:1 … (WebGPU)")
    return device, 0


def preload_libraries(onnxruntime: Any) -> None:
    """Load CUDA's and cuDNN's libraries, if they are packages of this Python.

    ONNX Runtime prints those that it does not find. Its own `print` goes to stderr meanwhile. Standard output as a whole is
    not redirected, since other threads of this process may be printing.
    """
    onnxruntime.print = partial(print, file=sys.stderr)
    try:
        onnxruntime.preload_dlls()
    finally:
        del onnxruntime.print
