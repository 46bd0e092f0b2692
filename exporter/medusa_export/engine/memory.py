"""Gives TensorRT the weights from mapped files, and frees memory during a build."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

PAUSE = 0.05  # seconds between two releases of memory


class MappedWeights:
    """The external tensors of a graph. Each of their files is mapped once.

    Args:
        model: the graph. All its external tensors are in one directory.
        directory: that directory.
    """

    def __init__(self, model: ir.Model, directory: Path) -> None:
        self.tensors = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        files = {str(tensor.location) for tensor in self.tensors.values()}
        self._mappings = {file: _map(directory / file) for file in files}

    def address(self, name: str) -> tuple[int, int]:
        """A tensor's address and its size in bytes. The address is valid as long as this object lives."""
        tensor = self.tensors[name]
        start = np.frombuffer(self._mappings[str(tensor.location)], np.uint8).ctypes.data
        assert tensor.offset is not None
        assert tensor.length is not None
        return start + tensor.offset, tensor.length

    @contextmanager
    def released(self) -> Iterator[None]:
        """While open, a thread returns memory to the system: pages that were read, and freed heap blocks.

        TensorRT keeps its own copies of weights, so the pages are not needed again. This works only on Linux; on other systems
        a build uses more memory.
        """
        if sys.platform != "linux":
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._release_until, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _release_until(self, done: threading.Event) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        while not done.wait(PAUSE):
            for mapping in self._mappings.values():
                mapping.madvise(mmap.MADV_DONTNEED)
            if trim is not None:
                trim(0)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
