"""Removes from plans the weights that the ONNX bundle also has.

TensorRT copies most weights into a plan byte for byte. Some are interleaved: the rows of q, k and v, for example, become the
rows of one matrix. These bytes are removed from the stored plan and put back when it is loaded
(`medusa_runtime.bundle.plans`). The loaded plan is the same, byte for byte, so nothing is refitted. Weights that TensorRT
stored in another layout stay in the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_runtime.bundle.files import replacing
from medusa_runtime.bundle.manifest import FileFacts, PartFacts, RegionFacts, StrippedPlan
from medusa_runtime.bundle.plans import Bytes, plan_gaps, region_rows

WORD = 8  # bytes; in a plan, tensors start at multiples of it
KEY_WORDS = 4  # words at the start of a tensor by which it is found
CHUNK = 1 << 22  # words that are searched at a time


@dataclass(frozen=True)
class Stored:
    """A tensor of the weights file: `rows` rows of `row_bytes` bytes each, starting at `offset`."""

    offset: int
    rows: int
    row_bytes: int


def stored_tensors(model: ir.Model) -> list[Stored]:
    """The external tensors of a graph. A row is one slice along the last axis."""
    found = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None and tensor.length:
            rows = math.prod(size for size in tensor.shape[:-1] if isinstance(size, int))
            found.add(Stored(tensor.offset, rows, tensor.length // rows))
    return sorted(found, key=lambda tensor: tensor.offset)


def strip_plan(path: Path, weights: Path, tensors: Iterable[Stored], whole: FileFacts) -> tuple[FileFacts, StrippedPlan]:
    """Remove from a plan the tensors that the weights file holds.

    Args:
        path: the plan; it is replaced.
        weights: the weights file.
        tensors: the tensors in that file.
        whole: size and digest of the whole plan.

    Returns:
        The facts of the stripped file, and the description needed to restore the plan.
    """
    plan, source = (np.memmap(file, np.uint8, mode="r") for file in (path, weights))
    regions = list(find_regions(plan, source, tensors))
    digest, size = hashlib.sha256(), 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        for start, stop in plan_gaps(plan.size, regions):
            file.write(plan[start:stop].data)
            digest.update(plan[start:stop].data)
            size += stop - start
        del plan  # close it before its file is replaced
    return FileFacts(size=size, sha256=digest.hexdigest()), StrippedPlan(**whole.model_dump(), regions=regions)


def find_regions(plan: Bytes, source: Bytes, tensors: Iterable[Stored]) -> Iterator[RegionFacts]:
    """The regions of a plan that hold tensors of a weights file, single or interleaved; in order, without overlap."""
    firsts = _first_rows(plan, source, tensors)
    end = 0
    for position in sorted(firsts):
        if position < end:
            continue
        row = list(_side_by_side(firsts, position))
        for parts in (row, row[:1]):
            region = RegionFacts(
                offset=position,
                rows=parts[0].rows,
                parts=[PartFacts(source=part.offset, row_bytes=part.row_bytes) for part in parts],
            )
            if _holds(plan, source, region):
                end = position + region.num_bytes
                yield region
                break


def _side_by_side(firsts: dict[int, Stored], position: int) -> Iterator[Stored]:
    """The tensors whose first rows follow one another from a position on and that have the same number of rows."""
    rows = firsts[position].rows
    while (tensor := firsts.get(position)) and tensor.rows == rows:
        yield tensor
        position += tensor.row_bytes


def _holds(plan: Bytes, source: Bytes, region: RegionFacts) -> bool:
    if region.offset + region.num_bytes > plan.size:
        return False
    return all(
        np.array_equal(rows, source[part.source :][: rows.size].reshape(rows.shape))
        for rows, part in zip(region_rows(plan, region), region.parts, strict=True)
    )


def _first_rows(plan: Bytes, source: Bytes, tensors: Iterable[Stored]) -> dict[int, Stored]:
    """The positions in the plan that hold the first words of a tensor."""
    keys: dict[bytes, Stored] = {}
    for tensor in tensors:
        key = source[tensor.offset :][: KEY_WORDS * WORD].tobytes()
        if len(set(key)) > 1 and tensor.row_bytes >= KEY_WORDS * WORD:  # zeros would match everywhere
            keys.setdefault(key, tensor)
    if not keys:
        return {}
    words: npt.NDArray[np.uint64] = plan[: plan.size // WORD * WORD].view(np.uint64)
    starts = np.unique(np.array([np.frombuffer(key, np.uint64)[0] for key in keys]))
    found = {}
    for begin in range(0, words.size, CHUNK):
        chunk = words[begin : begin + CHUNK]
        near = np.minimum(np.searchsorted(starts, chunk), starts.size - 1)
        for index in np.flatnonzero(starts[near] == chunk):
            position = (begin + int(index)) * WORD
            key = plan[position : position + KEY_WORDS * WORD].tobytes()
            if key in keys:
                found[position] = keys[key]
    return found
