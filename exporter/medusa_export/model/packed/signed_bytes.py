"""Weights stored as signed 8-bit integers, one in a byte, with a scale for the tensor, each output, group or block."""

from __future__ import annotations

from functools import partial

import torch

from medusa_export.model.packed.scaled_floats import spread
from medusa_export.model.packed.tensors import IntegerWeight, LazyIntegers, LazyWeight, Readable, Tensors
from medusa_heads.errors import CheckpointError

BITS, HALF_RANGE = 8, 128
Block = tuple[int, int] | None  # outputs and inputs of a block that shares a scale, if the checkpoint's settings name them


def read_signed_bytes(tensors: Tensors, codes: str, scale: str, zero: str, block: Block = None) -> Readable:
    """A weight, ``(codes - zero) * scale``. A matrix keeps its integers; a weight of another shape is read as floats alone.

    Args:
        tensors: the checkpoint.
        codes: the name of the integers.
        scale: the name of the scales.
        zero: the name of the zero points, which may be missing.
        block: outputs and inputs of a block that shares a scale, if the checkpoint's settings name them.
    """
    if len(tensors.shape(codes)) == 2:
        return LazyIntegers(partial(_integers, tensors, codes, scale, zero, block))
    return LazyWeight(partial(_floats, tensors, codes, scale, zero, block))


def signed_bytes(
    codes: torch.Tensor,  # [N, K] int8
    scales: torch.Tensor,  # [N, G]
    zeros: torch.Tensor | None = None,  # [N, G]
    group_of: torch.Tensor | None = None,  # [K]
) -> IntegerWeight:
    """The weight ``(codes - zeros) * scales``."""
    offset = torch.full(scales.shape, HALF_RANGE, dtype=torch.int32)
    shifted = (codes.to(torch.int16) + HALF_RANGE).to(torch.uint8)
    return IntegerWeight(shifted, scales, offset if zeros is None else offset + zeros.to(torch.int32), BITS, group_of)


def _integers(tensors: Tensors, codes: str, scale: str, zero: str, block: Block) -> IntegerWeight:
    outputs, inputs = tensors.shape(codes)
    given = tensors.shape(scale)
    groups = given[-1] if len(given) > 1 else 1
    size = block[1] if block is not None and -(-inputs // block[1]) == groups else -(-inputs // groups)
    firsts = torch.arange(groups) * size  # of each group, the first input
    scales, zeros = (
        _fitted(tensors, name, codes, block).expand(outputs, inputs)[:, firsts].contiguous() if name in tensors else None
        for name in (scale, zero)
    )
    assert scales is not None
    return signed_bytes(tensors.read(codes), scales, zeros, torch.arange(inputs) // size)


def _floats(tensors: Tensors, codes: str, scale: str, zero: str, block: Block) -> torch.Tensor:
    weight = tensors.read(codes).to(torch.float32)
    if zero in tensors:
        weight -= _fitted(tensors, zero, codes, block)
    return weight.mul_(_fitted(tensors, scale, codes, block))


def _fitted(tensors: Tensors, name: str, codes: str, block: Block) -> torch.Tensor:
    """Scales or zero points, spread over a weight so that each element has its own."""
    try:
        return spread(tensors.read(name).to(torch.float32), torch.Size(tensors.shape(codes)), block)
    except ValueError as error:
        raise CheckpointError(f"{tensors.directory}: {name} does not fit {codes}: {error}") from error
