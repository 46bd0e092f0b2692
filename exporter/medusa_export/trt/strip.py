"""Plans without the weights that the bundle they were built from holds as well.

TensorRT copies most weights into a plan byte for byte, some of them side by side: the rows of q, k and v, say, as the rows of
one matrix. They are left out of the stored plan and put back when it is loaded (`medusa_runtime.bundle.plans`). The
loaded plan is the same, byte for byte, so nothing is refitted. Weights that TensorRT stored in another layout stay in the plan.
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

WORD = 8  # bytes; tensors begin at multiples of it in a plan
KEY_WORDS = 4  # that a tensor is looked for by
CHUNK = 1 << 22  # words looked at in one go


@dataclass(frozen=True)
class Stored:
    """A tensor of the weights file: `rows` times `row_bytes` from `offset` on."""

    offset: int
    rows: int
    row_bytes: int


def stored_tensors(model: ir.Model) -> list[Stored]:
    """The external tensors of a graph; a tensor's rows are what its last axis counts."""
    found = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None and tensor.length:
            rows = math.prod(size for size in tensor.shape[:-1] if isinstance(size, int))
            found.add(Stored(tensor.offset, rows, tensor.length // rows))
    return sorted(found, key=lambda tensor: tensor.offset)


def strip_plan(path: Path, weights: Path, tensors: Iterable[Stored], whole: FileFacts) -> tuple[FileFacts, StrippedPlan]:
    """Leave out of a plan what the weights file holds.

    Args:
        path: the plan; it is replaced.
        weights: the file.
        tensors: what is in it.
        whole: the plan's size and digest.

    Returns:
        The facts of the file that is left, and what it takes to make the plan of it again.
    """
    plan, source = (np.memmap(file, np.uint8, mode="r") for file in (path, weights))
    regions = list(find_regions(plan, source, tensors))
    digest, size = hashlib.sha256(), 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        for start, stop in plan_gaps(plan.size, regions):
            file.write(plan[start:stop].data)
            digest.update(plan[start:stop].data)
            size += stop - start
        del plan  # before its file is replaced
    return FileFacts(size=size, sha256=digest.hexdigest()), StrippedPlan(**whole.model_dump(), regions=regions)


def find_regions(plan: Bytes, source: Bytes, tensors: Iterable[Stored]) -> Iterator[RegionFacts]:
    """Where a plan holds tensors of a weights file, alone or side by side; in order, without overlap."""
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
    """The tensors whose first rows follow one another from a position on, as long as they have as many rows."""
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
    """Positions in the plan at which the first words of a tensor are."""
    keys: dict[bytes, Stored] = {}
    for tensor in tensors:
        key = source[tensor.offset :][: KEY_WORDS * WORD].tobytes()
        if len(set(key)) > 1 and tensor.row_bytes >= KEY_WORDS * WORD:  # zeros are everywhere
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
