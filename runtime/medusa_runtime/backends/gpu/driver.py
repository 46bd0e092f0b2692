"""One GPU by NVIDIA's driver: memory, copies, one stream, captured graphs.

Everything except allocation is asynchronous: calls queue work on the GPU's one stream, in order, and the work is done when
`Gpu.synchronize` returns. The CUDA Driver API reference describes the driver's functions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_runtime.errors import BackendError, CapacityError, DeviceLostError, MissingExtraError

NON_BLOCKING = 1  # a stream with this flag does not wait for the default stream
THREAD_LOCAL = "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"  # a capture restricts only the thread that captures
NO_DRIVER = "there is no NVIDIA driver on this machine"

LASTING = frozenset(  # after these, every call of the process fails, as NVIDIA's reference says
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT",
        "CONTEXT_IS_DESTROYED",
        "ECC_UNCORRECTABLE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
    )
)


class NoGpuError(BackendError):
    """There is no NVIDIA driver, or no GPU, on this machine."""


@dataclass(frozen=True)
class GpuFacts:
    """A GPU's name and properties."""

    index: int
    name: str
    compute_capability: str  # such as "8.9"
    memory: int  # bytes in total


@dataclass(frozen=True)
class Block:
    """A block of entries in the GPU's memory: `depth` times `height` runs of `width` bytes.

    Two runs of one depth are `pitch` bytes apart. Two depths are `rows * pitch` bytes apart.
    """

    address: int
    width: int
    height: int
    depth: int
    pitch: int
    rows: int


class Driver:
    """NVIDIA's driver, through its Python bindings.

    Raises:
        MissingExtraError: the bindings are not installed.
        NoGpuError: there is no driver, or it finds no GPU.
    """

    def __init__(self) -> None:
        try:
            self.api: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingExtraError("cuda-bindings", "cuda") from error
        try:
            code, *_ = self.api.cuInit(0)
        except Exception as error:  # the bindings find no library, in an error of their own
            raise NoGpuError(NO_DRIVER) from error
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise NoGpuError(f"the NVIDIA driver finds no GPU here ({self._name(code)})")

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver by name. Returns what the function returns besides its status.

        Raises:
            CapacityError: the GPU's memory is full.
            DeviceLostError: the GPU fails every call of this process from now on.
            BackendError: the status is any other failure.
        """
        code, *values = getattr(self.api, name)(*arguments)
        if code == self.api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise CapacityError(f"the GPU has no memory left ({name})")
        if code != self.api.CUresult.CUDA_SUCCESS:
            if (status := self._name(code)) in LASTING:
                raise DeviceLostError(f"the GPU is lost to this process, which must be started again: {name} says {status}")
            raise BackendError(f"the GPU's driver failed: {name} says {status}")
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def version(self) -> str:
        """The newest CUDA version that the driver supports, such as ``13.0``."""
        number = int(self("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def gpus(self) -> list[GpuFacts]:
        """The GPUs of this machine that this process can see."""
        return [self.facts(index) for index in range(int(self("cuDeviceGetCount")))]

    def facts(self, index: int) -> GpuFacts:
        """The facts of one GPU."""
        device = self("cuDeviceGet", index)
        attribute = self.api.CUdevice_attribute
        major = self("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        name = self("cuDeviceGetName", 256, device).decode(errors="replace").strip("\x00 ")
        return GpuFacts(index, name, f"{major}.{minor}", int(self("cuDeviceTotalMem", device)))

    def _name(self, code: Any) -> str:
        return str(getattr(code, "name", code))


class Gpu:
    """One GPU: its primary context, which other libraries of this process share, and one stream of our own.

    Args:
        index: its number among the visible GPUs.

    Raises:
        MissingExtraError, NoGpuError: see `Driver`.
        BackendError: there is no GPU of that index.
    """

    def __init__(self, index: int = 0) -> None:
        self._driver = Driver()
        if index >= (count := int(self._driver("cuDeviceGetCount"))):
            raise BackendError(f"there is no cuda:{index}; this machine has {count} GPU{'s' * (count != 1)}")
        self.facts = self._driver.facts(index)
        self._context = self._driver("cuDevicePrimaryCtxRetain", self._driver("cuDeviceGet", index))
        self.make_current()
        self._stream = self._driver("cuStreamCreate", NON_BLOCKING)
        self._is_capturing = False
        self._left: list[tuple[str, Any]] = []  # frees postponed until the capture ends

    @property
    def stream(self) -> int:
        """The stream's handle, for libraries that queue work on it too."""
        return int(self._stream)

    def make_current(self) -> None:
        """Direct this thread's calls to this GPU."""
        self._driver("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        """Bytes that are free now."""
        free, _ = self._driver("cuMemGetInfo")
        return int(free)

    def allocate(self, num_bytes: int, what: str) -> DeviceMemory:
        """Memory on the GPU, filled with zeros.

        Args:
            num_bytes: its size.
            what: its purpose, for messages.

        Raises:
            CapacityError: there is not enough memory; the message says how much is needed and how much is free.
        """
        try:
            memory = DeviceMemory(self, int(self._driver("cuMemAlloc", max(num_bytes, 1))), num_bytes)
        except CapacityError as error:
            raise self.shortage(what, num_bytes) from error
        self._driver("cuMemsetD8Async", memory.address, 0, max(num_bytes, 1), self._stream)
        return memory

    def shortage(self, what: str, num_bytes: int) -> CapacityError:
        """The error for memory that is not available. It is made only after the allocation failed: on Jetson, more than the
        free memory can be allocated.
        """
        return CapacityError(
            f"{what} needs {_in_words(num_bytes)} of GPU memory, {_in_words(self.free_memory())} are free "
            f"on {self.facts.name}; "
            "lower max_batch_size, or export or build with shorter sequences (--max-seq-len)"
        )

    def give_back(self, function: str, handle: Any) -> None:
        """Free something by that function of the driver, once no queued work can use it."""
        if self._is_capturing:  # the driver allows no frees now
            self._left.append((function, handle))
            return
        with suppress(BackendError):  # at the end of the process, the driver may be gone already
            self._driver("cuCtxPushCurrent", self._context)  # a finalizer may run in any thread, which has a context of its own
            try:
                self.synchronize()
                self._driver(function, handle)
            finally:
                self._driver("cuCtxPopCurrent")

    def pinned(self, num_bytes: int) -> PinnedMemory:
        """Memory of the host that the GPU can read and write.

        Raises:
            CapacityError: there is not enough memory.
        """
        try:
            return PinnedMemory(self, int(self._driver("cuMemHostAlloc", max(num_bytes, 1), 0)), max(num_bytes, 1))
        except CapacityError as error:
            raise CapacityError(f"this machine has no {_in_words(num_bytes)} of memory left that a GPU can use") from error

    def upload(self, target: int, source: PinnedMemory, num_bytes: int) -> None:
        """Queue a copy from the host to the GPU."""
        self._driver("cuMemcpyHtoDAsync", target, source.address, num_bytes, self._stream)

    def download(self, target: PinnedMemory, source: int, num_bytes: int) -> None:
        """Queue a copy from the GPU to the host."""
        self._driver("cuMemcpyDtoHAsync", target.address, source, num_bytes, self._stream)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy within the GPU. Source and target must not overlap."""
        self._driver("cuMemcpyDtoDAsync", target, source, num_bytes, self._stream)

    def copy_block(self, target: Block, source: Block) -> None:
        """Queue a copy of a block within the GPU, in one call. The blocks must have one size and must not overlap."""
        assert (target.width, target.height, target.depth) == (source.width, source.height, source.depth)
        device = self._driver.api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        order = self._driver.api.CUDA_MEMCPY3D()
        order.srcMemoryType, order.srcDevice, order.srcPitch, order.srcHeight = (
            device,
            source.address,
            source.pitch,
            source.rows,
        )
        order.dstMemoryType, order.dstDevice, order.dstPitch, order.dstHeight = (
            device,
            target.address,
            target.pitch,
            target.rows,
        )
        order.WidthInBytes, order.Height, order.Depth = source.width, source.height, source.depth
        self._driver("cuMemcpy3DAsync", order, self._stream)

    def clear_block(self, block: Block) -> None:
        """Queue filling a block with zeros."""
        height, depth = block.height, block.depth
        if height == block.rows:  # no gap between two depths
            height, depth = height * depth, 1
        for place in range(depth):
            address = block.address + place * block.rows * block.pitch
            self._driver("cuMemsetD2D8Async", address, block.pitch, 0, block.width, height, self._stream)

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        self._driver("cuStreamSynchronize", self._stream)

    def capture(self, queue: Callable[[], None]) -> CudaGraph:
        """Record the work that a function queues, without doing it, as a graph that one call launches.

        Raises:
            BackendError: the function makes a call that cannot be captured.
        """
        driver, mode = self._driver, getattr(self._driver.api.CUstreamCaptureMode, THREAD_LOCAL)
        driver("cuStreamBeginCapture", self._stream, mode)
        self._is_capturing = True
        try:
            queue()
        except BaseException:
            driver.api.cuStreamEndCapture(self._stream)  # its status does not matter: the stream is usable again
            raise
        else:
            graph = driver("cuStreamEndCapture", self._stream)
        finally:
            self._is_capturing = False
            while self._left:
                self.give_back(*self._left.pop())
        try:
            return CudaGraph(self, driver("cuGraphInstantiate", graph, 0))
        finally:
            driver("cuGraphDestroy", graph)

    def launch(self, graph: CudaGraph) -> None:
        """Queue the work of a graph."""
        self._driver("cuGraphLaunch", graph.handle, self._stream)


class CudaGraph:
    """Captured work. It is destroyed when no reference to it is left."""

    def __init__(self, gpu: Gpu, handle: Any) -> None:
        self._gpu = gpu
        self.handle = handle

    def __del__(self) -> None:
        self._gpu.give_back("cuGraphExecDestroy", self.handle)


class DeviceMemory:
    """A piece of the GPU's memory. It is freed when no reference to it is left."""

    def __init__(self, gpu: Gpu, address: int, num_bytes: int) -> None:
        self._gpu = gpu
        self.address = address
        self.num_bytes = num_bytes

    def __del__(self) -> None:
        self._gpu.give_back("cuMemFree", self.address)


class PinnedMemory:
    """A piece of the host's memory that the GPU can use. It is freed when no reference to it, or to an array in it, is left."""

    def __init__(self, gpu: Gpu, address: int, num_bytes: int) -> None:
        self._gpu = gpu
        self.address = address
        self.num_bytes = num_bytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's array interface, by which arrays keep this object alive: see "The array interface protocol" in its manual."""
        return {"version": 3, "typestr": "|u1", "shape": (self.num_bytes,), "data": (self.address, False)}

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array in it, `offset` bytes from its beginning."""
        size = math.prod(shape) * dtype.itemsize
        return np.asarray(self)[offset : offset + size].view(dtype).reshape(shape)

    def __del__(self) -> None:
        self._gpu.give_back("cuMemFreeHost", self.address)


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} KB"
