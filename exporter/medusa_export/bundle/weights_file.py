"""Writes a bundle's weights: one file, each tensor stored once, written one by one."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from medusa_export.passes.common.values import shape_of
from medusa_runtime.bundle.manifest import WEIGHTS_NAME, FileFacts

INLINE_BYTES = 1024  # smaller tensors stay in the graph: runtimes need their values to compute shapes
ALIGNMENT = 4096  # a page, so that a runtime can map the file
PIECE = 1 << 20  # bytes that are compared at a time


def total_bytes(models: Iterable[ir.Model]) -> int:
    """Bytes of all tensors to write. A tensor of two graphs is counted twice."""
    return sum(tensor.nbytes for _, tensor in _external(models))


def write_weights(models: Iterable[ir.Model], directory: Path, advance: Callable[[int], None] = lambda _: None) -> FileFacts:
    """Move the models' large tensors to the file `WEIGHTS_NAME`. Afterwards the models refer to that file.

    A tensor that two graphs or two names share is stored once. At most one tensor is in memory in addition to those that the
    models already hold.
    """
    offsets: dict[tuple[int, int], list[int]] = {}  # by checksum and length: where tensors begin that may be the same
    whole = hashlib.sha256()
    position = 0
    with (directory / WEIGHTS_NAME).open("w+b") as file:
        for value, tensor in _external(models):
            data = tensor.tobytes()
            alike = offsets.setdefault((zlib.crc32(data), len(data)), [])
            offset = next((start for start in alike if _holds(file, start, data)), None)
            if offset is None:
                padding = b"\0" * (-position % ALIGNMENT)
                file.seek(position)
                for piece in (padding, data):
                    file.write(piece)
                    whole.update(piece)
                offset = position + len(padding)
                alike.append(offset)
                position += len(padding) + len(data)
            value.const_value = ir.ExternalTensor(
                WEIGHTS_NAME,
                offset,
                len(data),
                tensor.dtype,
                shape=shape_of(tensor),
                name=value.name or "",
                base_dir=directory,
            )
            advance(len(data))
    return FileFacts(size=position, sha256=whole.hexdigest())


def _holds(file: BinaryIO, start: int, data: bytes) -> bool:
    """Whether a file has these bytes at this place: a checksum can be equal by chance."""
    file.seek(start)
    view = memoryview(data)
    return all(file.read(len(part)) == part for part in (view[at : at + PIECE] for at in range(0, len(data), PIECE)))


def _external(models: Iterable[ir.Model]) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    return [
        (value, value.const_value)
        for model in models
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES
    ]
