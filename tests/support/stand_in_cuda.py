"""A stand-in for `cuda.bindings.driver`: the functions that are used, on the host's memory, in the order a GPU would keep.

Queued work is done when the stream is waited for and not before, and what a queued copy will bring down is scribbled over
until then: so whoever reads too early reads nonsense. Every copy must lie within memory that is allocated, on the side that it
says, and every call must come from a thread whose context is current. All calls are recorded by name.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

SCRIBBLE = 0x5B
MEMORY = 1 << 30  # bytes of the device
Job = Callable[[], None]


class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


OK = CUresult.CUDA_SUCCESS
GLOBAL = {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName",
          "cuDeviceTotalMem", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxPushCurrent",
          "cuCtxPopCurrent"}  # fmt: skip


@dataclass
class Captured:
    """A CUDA graph: what it does when it is launched, and who has to agree to that."""

    jobs: list[Job] = field(default_factory=list)


class StandInDriver:
    """The module. One device, one stream at a time."""

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE="device")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread-local")
    CUDA_MEMCPY3D = SimpleNamespace

    def __init__(self, compute_capability: str = "8.9", memory: int = MEMORY) -> None:
        self.major, self.minor = map(int, compute_capability.split("."))
        self.memory = memory
        self.calls: list[str] = []
        self.device: dict[int, np.ndarray] = {}  # by address
        self.pinned: dict[int, np.ndarray] = {}
        self.queue: list[Job] = []
        self.capturing: list[Job] | None = None
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(type(self), f"_{name[2:].lower()}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name not in GLOBAL and not self.is_current:
                return (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
            found = function(self, *arguments)
            return found if isinstance(found, tuple) and isinstance(found[0], CUresult) else (OK, found)

        return call

    def add(self, job: Job) -> None:
        """Queue work on the stream, or record it."""
        (self.queue if self.capturing is None else self.capturing).append(job)

    def take_calls(self) -> list[str]:
        """What was called since this was asked last."""
        calls, self.calls = self.calls, []
        return calls

    def room(self, address: int, size: int, *, on_device: bool) -> np.ndarray:
        """The bytes at an address; they must be allocated there."""
        for start, memory in (self.device if on_device else self.pinned).items():
            if start <= address and address + size <= start + len(memory):
                return memory[address - start : address - start + size]
        side = "device" if on_device else "host"
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated on the {side}")

    def used(self) -> int:
        """Bytes of the device that are allocated."""
        return sum(len(memory) for memory in self.device.values())

    def _init(self, _: int) -> None: ...
    def _drivergetversion(self) -> int:
        return 13020

    def _devicegetcount(self) -> int:
        return 1

    def _deviceget(self, index: int) -> int:
        return index

    def _devicegetattribute(self, name: str, _: int) -> int:
        return self.major if name == "major" else self.minor

    def _devicegetname(self, length: int, _: int) -> bytes:
        return b"Stand-in GPU".ljust(length, b"\0")

    def _devicetotalmem(self, _: int) -> int:
        return self.memory

    def _deviceprimaryctxretain(self, _: int) -> str:
        return "context"

    def _ctxsetcurrent(self, context: str) -> None:
        self._thread.current = context == "context"

    def _ctxpushcurrent(self, context: str) -> None:
        self._thread.pushed = [*getattr(self._thread, "pushed", []), self.is_current]
        self._thread.current = context == "context"

    def _ctxpopcurrent(self) -> str:
        *self._thread.pushed, self._thread.current = self._thread.pushed
        return "context"

    @property
    def is_current(self) -> bool:
        """Whether the context is current in this thread."""
        return getattr(self._thread, "current", False)

    def _streamcreate(self, _: int) -> int:
        return 77

    def _memgetinfo(self) -> Any:
        return OK, self.memory - self.used(), self.memory

    def _memalloc(self, size: int) -> Any:
        if self.used() + size > self.memory:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        return self._allocate(self.device, size)

    def _memhostalloc(self, size: int, _: int) -> int:
        return self._allocate(self.pinned, size)

    def _allocate(self, memory: dict[int, np.ndarray], size: int) -> int:
        whole = np.full(size + 256, SCRIBBLE, np.uint8)  # nobody promises zeros
        start = -whole.ctypes.data % 256
        piece = whole[start : start + size]
        memory[piece.ctypes.data] = piece
        return int(piece.ctypes.data)

    def _memfree(self, address: int) -> None:
        assert not self.queue, "memory is freed while work is queued"
        del self.device[address]

    def _memfreehost(self, address: int) -> None:
        assert not self.queue, "memory is freed while work is queued"
        del self.pinned[address]

    def _memsetd8async(self, address: int, value: int, size: int, _: int) -> None:
        self.add(lambda: self.room(address, size, on_device=True).fill(value))

    def _memsetd2d8async(self, address: int, pitch: int, value: int, width: int, height: int, _: int) -> None:
        def fill() -> None:
            for row in range(height):
                self.room(address + row * pitch, width, on_device=True).fill(value)

        self.add(fill)

    def _memcpyhtodasync(self, target: int, source: int, size: int, _: int) -> None:
        self._copy(target, source, size, to_device=True, from_device=False)

    def _memcpydtohasync(self, target: int, source: int, size: int, _: int) -> None:
        self.room(target, size, on_device=False).fill(SCRIBBLE)
        self._copy(target, source, size, to_device=False, from_device=True)

    def _memcpydtodasync(self, target: int, source: int, size: int, _: int) -> None:
        assert abs(target - source) >= size, "the copy overlaps"
        self._copy(target, source, size, to_device=True, from_device=True)

    def _copy(self, target: int, source: int, size: int, *, to_device: bool, from_device: bool) -> None:
        def copy() -> None:
            self.room(target, size, on_device=to_device)[:] = self.room(source, size, on_device=from_device)

        self.add(copy)

    def _memcpy3dasync(self, order: Any, _: int) -> None:
        assert order.srcMemoryType == order.dstMemoryType == "device"
        places = [
            (depth * order.dstHeight * order.dstPitch + row * order.dstPitch,
             depth * order.srcHeight * order.srcPitch + row * order.srcPitch)
            for depth in range(order.Depth)
            for row in range(order.Height)
        ]  # fmt: skip
        target, source, width = order.dstDevice, order.srcDevice, order.WidthInBytes
        assert width <= min(order.srcPitch, order.dstPitch)

        def copy() -> None:
            read = [self.room(source + offset, width, on_device=True).copy() for _, offset in places]
            for (offset, _), piece in zip(places, read, strict=True):
                self.room(target + offset, width, on_device=True)[:] = piece

        assert abs(target - source) >= width or target == source, "the copy overlaps"
        self.add(copy)

    def _streamsynchronize(self, _: int) -> None:
        assert self.capturing is None, "a stream that captures cannot be waited for"
        queue, self.queue = self.queue, []
        for job in queue:
            job()

    def _streambegincapture(self, _: int, mode: str) -> None:
        assert mode == "thread-local"
        self.capturing = []

    def _streamendcapture(self, _: int) -> Captured:
        jobs, self.capturing = self.capturing, None
        assert jobs is not None
        return Captured(jobs)

    def _graphinstantiate(self, graph: Captured, _: int) -> Captured:
        return Captured(list(graph.jobs))

    def _graphdestroy(self, graph: Captured) -> None:
        graph.jobs.clear()

    def _graphexecdestroy(self, graph: Captured) -> None:
        assert not self.queue, "a graph is destroyed while work is queued"
        graph.jobs.clear()

    def _graphlaunch(self, graph: Captured, _: int) -> None:
        self.queue.extend(graph.jobs)
