"""A GPU for tests where there is none: SwiftShader, a Vulkan driver that computes on the CPU. Debian's chromium brings it."""

from __future__ import annotations

import ctypes.util
import os
import tempfile
from pathlib import Path

from medusa_runtime.backends.webgpu.adapters import ALLOW_SOFTWARE, find_adapters
from medusa_runtime.errors import MedusaError

DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")


def why_no_webgpu() -> str | None:
    """Why WebGPU cannot run in this process, even in software; None if it can. Chooses the software driver if it is there."""
    if DRIVER.exists() and ctypes.util.find_library("vulkan") is not None:
        os.environ.setdefault("VK_DRIVER_FILES", str(DRIVER))
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
        os.environ.setdefault(ALLOW_SOFTWARE, "1")
    try:
        if find_adapters():
            return None
    except MedusaError as error:
        return str(error)
    return "WebGPU finds no GPU, and there is no driver in software (Debian: apt-get install chromium libvulkan1)"
