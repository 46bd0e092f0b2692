"""The bundle's weights: one file, each tensor once, streamed tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir

from medusa_export.graph.values import shape_of
from medusa_runtime.bundle.manifest import WEIGHTS_NAME, FileFacts

INLINE_BYTES = 1024  # smaller tensors stay in the graph, where a runtime needs them to fold shapes
ALIGNMENT = 4096  # pages, so that a runtime can map the file


def total_bytes(models: Iterable[ir.Model]) -> int:
    """Bytes of all tensors that will be written, tensors of two graphs counted twice."""
    return sum(tensor.nbytes for _, tensor in _external(models))


def write_weights(models: Iterable[ir.Model], directory: Path, advance: Callable[[int], None] = lambda _: None) -> FileFacts:
    """Move the models' large tensors into `WEIGHTS_NAME` and make the models refer to it.

    A tensor that two graphs share, or that two names hold, is stored once. No more than one tensor is in memory beyond
    what the models hold already.
    """
    offsets: dict[bytes, int] = {}
    whole = hashlib.sha256()
    position = 0
    with (directory / WEIGHTS_NAME).open("wb") as file:
        for value, tensor in _external(models):
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in offsets:
                padding = b"\0" * (-position % ALIGNMENT)
                for piece in (padding, data):
                    file.write(piece)
                    whole.update(piece)
                offsets[digest] = position + len(padding)
                position += len(padding) + len(data)
            value.const_value = ir.ExternalTensor(
                WEIGHTS_NAME,
                offsets[digest],
                len(data),
                tensor.dtype,
                shape=shape_of(tensor),
                name=value.name or "",
                base_dir=directory,
            )
            advance(len(data))
    return FileFacts(size=position, sha256=whole.hexdigest())


def _external(models: Iterable[ir.Model]) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    return [
        (value, value.const_value)
        for model in models
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES
    ]
