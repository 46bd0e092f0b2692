"""Packets: the small arrays that a step uploads or downloads, packed together so that each direction is one copy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_runtime.backends.gpu.driver import DeviceMemory, Gpu, PinnedMemory

ALIGNMENT = 256  # bytes; TensorRT requires it of a tensor's address


@dataclass(frozen=True)
class Tensor:
    """An array on the GPU."""

    address: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """The place of an array in a packet."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Layout:
    """The places of arrays that lie one after another, each aligned."""

    places: dict[str, Place]
    num_bytes: int

    @classmethod
    def of(cls, **arrays: tuple[tuple[int, ...], Any]) -> Layout:
        """The layout of some arrays. arrays: the shape and dtype of each, by name."""
        places, offset = {}, 0
        for name, (shape, kind) in arrays.items():
            dtype = np.dtype(kind)
            places[name] = Place(offset, shape, dtype)
            offset = aligned(offset + math.prod(shape) * dtype.itemsize)
        return cls(places, offset)


class Packet:
    """Memory on the GPU and, if it is to be uploaded or downloaded, as much on the host.

    It can grow, but growing changes its addresses: reserve the largest size at once if it is known.

    Args:
        gpu: the GPU.
        what: its purpose, for messages.
    """

    def __init__(self, gpu: Gpu, what: str) -> None:
        self._gpu, self._what = gpu, what
        self._host: PinnedMemory | None = None
        self._device: DeviceMemory | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on the GPU."""
        return self._device.num_bytes if self._device else 0

    def reserve(self, num_bytes: int, *, on_host: bool = True) -> bool:
        """Make room for this many bytes. No queued work may use the packet. Returns whether addresses changed."""
        changed = False
        if self._device is None or num_bytes > self._device.num_bytes:
            self._device = None  # frees the old memory before more is taken
            self._device, changed = self._gpu.allocate(num_bytes, self._what), True
        if on_host and (self._host is None or num_bytes > self._host.num_bytes):
            self._host, changed = self._gpu.pinned(num_bytes), True
        return changed

    @property
    def address(self) -> int:
        """Its first address on the GPU."""
        assert self._device is not None
        return self._device.address

    def tensor(self, place: Place) -> Tensor:
        """An array on the GPU."""
        return Tensor(self.address + place.offset, place.shape)

    def host(self, place: Place) -> npt.NDArray[Any]:
        """An array on the host."""
        assert self._host is not None
        return self._host.view(place.offset, place.shape, place.dtype)

    def upload(self, layout: Layout) -> None:
        """Queue the copy of all its arrays to the GPU."""
        assert self._host is not None
        self._gpu.upload(self.address, self._host, layout.num_bytes)

    def download(self, layout: Layout) -> None:
        """Queue the copy of all its arrays to the host."""
        assert self._host is not None
        self._gpu.download(self._host, self.address, layout.num_bytes)

    def free(self) -> None:
        """Give the memory back. No queued work may use it."""
        self._host = self._device = None


def aligned(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
