"""A GPU for tests where there is none: SwiftShader, a Vulkan driver that computes on the CPU. Debian's chromium brings it."""

from __future__ import annotations

import ctypes.util
import os
import tempfile
from pathlib import Path

from medusa_runtime.backends.webgpu.adapters import ALLOW_SOFTWARE, find_adapters
from medusa_runtime.errors import MedusaError

DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")


def settings() -> dict[str, str]:
    """The environment variables with which the driver in software is found and allowed; none if it is not there."""
    if not DRIVER.exists() or ctypes.util.find_library("vulkan") is None:
        return {}
    return {"VK_DRIVER_FILES": str(DRIVER), "XDG_RUNTIME_DIR": tempfile.gettempdir(), ALLOW_SOFTWARE: "1"}


def why_no_webgpu() -> str | None:
    """Why WebGPU cannot run in this process, even in software; None if it can. Chooses the software driver if it is there."""
    before = dict(os.environ)
    os.environ.update(settings())
    try:
        if find_adapters():  # from now on they are known in this process
            return None
    except MedusaError as error:
        return str(error)
    finally:
        for name in settings():  # other tests start processes, which are not to find the driver
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})
    return "WebGPU finds no GPU, and there is no driver in software (Debian: apt-get install chromium libvulkan1)"
