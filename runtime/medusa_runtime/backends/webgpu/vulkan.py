"""What Vulkan's driver tells of the GPUs: their memory, and the largest buffer. WebGPU's provider does not tell it.

Read through the loader's C interface (Vulkan 1.1). Offsets are those of `VkPhysicalDeviceProperties` and
`VkPhysicalDeviceMemoryProperties` in the Vulkan specification; they are the same on all 64-bit systems.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

from medusa_runtime.backends.webgpu.adapters import Adapter

LIBRARIES = {"linux": "libvulkan.so.1", "win32": "vulkan-1.dll"}
VERSION_1_1 = 1 << 22 | 1 << 12
INSTANCE_CREATE_INFO, PROPERTIES_2, MAINTENANCE_3 = 1, 1000059001, 1000168000  # values of VkStructureType
CPU, DEVICE_LOCAL = 4, 1  # a value of VkPhysicalDeviceType, and a flag of VkMemoryHeap
PROPERTIES_BYTES, MEMORY_BYTES = 824, 520
NAME, HEAP_COUNT, HEAPS = 20, 260, 264


@dataclass(frozen=True)
class VulkanDevice:
    """A GPU, or a driver in software."""

    name: str
    vendor_id: int
    device_id: int
    is_software: bool
    memory: int  # bytes of its largest memory
    largest_buffer: int  # bytes


def device_of(adapter: Adapter, devices: Sequence[VulkanDevice]) -> VulkanDevice | None:
    """The device that an adapter of WebGPU is; None if Vulkan does not know it."""
    if adapter.is_software:
        return next((device for device in devices if device.is_software), None)
    for device in devices:
        hardware = adapter.device.device
        if (device.vendor_id, device.device_id) == (hardware.vendor_id, hardware.device_id):
            return device
    return None


class _Application(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("name", c_char_p),
        ("version", c_uint32),
        ("engine", c_char_p),
        ("engine_version", c_uint32),
        ("api_version", c_uint32),
    )


class _CreateInfo(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("flags", c_uint32),
        ("application", POINTER(_Application)),
        ("num_layers", c_uint32),
        ("layers", c_void_p),
        ("num_extensions", c_uint32),
        ("extensions", c_void_p),
    )


class _Maintenance3(ctypes.Structure):
    _fields_ = (("type", c_uint32), ("next", c_void_p), ("max_descriptors", c_uint32), ("max_allocation", c_uint64))


class _Properties2(ctypes.Structure):
    _fields_ = (("type", c_uint32), ("next", c_void_p), ("properties", c_uint64 * (PROPERTIES_BYTES // 8)))


def find_vulkan_devices() -> list[VulkanDevice]:
    """The devices of this machine, in the loader's order. None if there is no Vulkan, as on a Mac, or it tells nothing."""
    name = LIBRARIES.get(sys.platform)
    try:
        vulkan = ctypes.CDLL(name) if name is not None else None
    except OSError:
        return []
    if vulkan is None:
        return []
    application = _Application(api_version=VERSION_1_1)
    created, instance = _CreateInfo(type=INSTANCE_CREATE_INFO, application=ctypes.pointer(application)), c_void_p()
    if vulkan.vkCreateInstance(byref(created), None, byref(instance)):
        return []
    try:
        count = c_uint32()
        if vulkan.vkEnumeratePhysicalDevices(instance, byref(count), None):
            return []
        handles = (c_void_p * count.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, byref(count), handles)
        return [_device(vulkan, c_void_p(handle)) for handle in handles[: count.value]]
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _device(vulkan: ctypes.CDLL, handle: c_void_p) -> VulkanDevice:
    limits = _Maintenance3(type=MAINTENANCE_3)
    properties = _Properties2(type=PROPERTIES_2, next=ctypes.cast(byref(limits), c_void_p))
    vulkan.vkGetPhysicalDeviceProperties2(handle, byref(properties))
    data = bytes(properties.properties)
    vendor, device, kind = struct.unpack_from("=III", data, 8)
    memory = ctypes.create_string_buffer(MEMORY_BYTES)
    vulkan.vkGetPhysicalDeviceMemoryProperties(handle, memory)
    (num_heaps,) = struct.unpack_from("=I", memory, HEAP_COUNT)
    heaps = [struct.unpack_from("=QI", memory, HEAPS + 16 * index) for index in range(num_heaps)]
    own = [size for size, flags in heaps if flags & DEVICE_LOCAL]
    name = data[NAME : NAME + 256].partition(b"\0")[0].decode("utf-8", "replace")
    return VulkanDevice(name, vendor, device, kind == CPU, max(own, default=0), int(limits.max_allocation))
