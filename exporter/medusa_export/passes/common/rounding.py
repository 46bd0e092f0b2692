"""Rounds weights [K inputs, N outputs] to integers: every scheme that a bundle or an engine stores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.generic]
BLOCK_SIZE = 32  # inputs that share a scale on the CPU: larger blocks are faster and less accurate (decision 45)
INT8_MAX, INT4_MAX, UINT4_MAX, FP8_MAX = 127, 7, 15, 448
CUTS = (1.0, 0.95, 0.9, 0.85, 0.8)  # parts of a block's range that 4-bit codes cover; the best one is used
_LEAST = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}  # normal numbers


def to_int8(weight: Matrix, axis: int) -> tuple[npt.NDArray[np.int8], Matrix]:
    """Codes in -127…127, and scales that the weights along `axis` share; the weight is about code x scale."""
    scale = scales_of_int8(weight, axis)
    codes = np.clip(np.rint(weight / np.expand_dims(scale, axis)), -INT8_MAX, INT8_MAX).astype(np.int8)
    return codes, scale


def scales_of_int8(weight: Matrix, axis: int) -> Matrix:
    """The least scales with which codes in -127…127 reach the largest weights along an axis."""
    largest = np.maximum(np.abs(weight).max(axis), np.finfo(np.float32).tiny * INT8_MAX)
    scales: Matrix = (largest / np.float32(INT8_MAX)).astype(np.float32)
    return scales


def to_int8_blocks(weight: Matrix, block: int = BLOCK_SIZE) -> tuple[npt.NDArray[np.int8], Matrix]:
    """Like `to_int8`, with one scale per output and block of inputs. weight: [K, N]; scales: [K / block, N]."""
    codes, scale = to_int8(weight.reshape(-1, block, weight.shape[1]), 1)
    return codes.reshape(weight.shape), scale


def to_uint4(weight: Matrix, block: int = BLOCK_SIZE) -> tuple[npt.NDArray[np.uint8], Matrix, npt.NDArray[np.uint8]]:
    """Codes in 0…15 [K, N], and scales and zero points [K / block, N]; the weight [K, N] is about (code - zero) x scale.

    Several ranges are tried, each clipping the outermost values more. Each block uses the one with the least squared error.
    """
    blocks = weight.reshape(-1, block, weight.shape[1])  # [K / block, block, N]
    low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
    best: tuple[Matrix, Matrix, Matrix] | None = None
    least = np.full(low.shape, np.inf, np.float32)
    for part in CUTS:
        scale = np.maximum((high - low) * part, np.finfo(np.float32).tiny * UINT4_MAX).astype(np.float32) / np.float32(
            UINT4_MAX
        )
        zero = np.clip(np.rint(-low * part / scale), 0, UINT4_MAX)
        codes = np.clip(np.rint(blocks / scale) + zero, 0, UINT4_MAX)
        error = np.square((codes - zero) * scale - blocks).sum(1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        found = (codes, scale, zero)
        best = found if best is None else tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    codes, scale, zero = best
    return codes.reshape(weight.shape).astype(np.uint8), scale[:, 0], zero[:, 0].astype(np.uint8)


def round_symmetrically(weight: Matrix, kind: str, dtype: ir.DataType, groups: int = 1) -> tuple[Codes, Codes]:
    """Codes and scales without zero points, as TensorRT requires.

    The scales are rounded to their type first, then each code is the one nearest to weight / scale.

    Args:
        weight: [K, N].
        kind: ``int8``, ``int4`` or ``fp8``.
        dtype: the scales' type.
        groups: G, the number of blocks of inputs with their own scales. G divides K.

    Returns:
        codes [K, N] and scales [G, N].
    """
    blocks = weight.reshape(groups, -1, weight.shape[1])  # [G, K / G, N]
    largest = np.abs(blocks).max(1, keepdims=True)
    codes: Codes
    if kind == "fp8":
        scale = _stored(largest / FP8_MAX, dtype)
        codes = np.clip(blocks / scale, -FP8_MAX, FP8_MAX).astype(ir.DataType.FLOAT8E4M3FN.numpy())
    elif kind == "int8":
        scale = _stored(largest / INT8_MAX, dtype)
        codes = np.clip(np.rint(blocks / scale), -INT8_MAX, INT8_MAX).astype(np.int8)
    else:
        scale = _best_scale(blocks, largest, dtype)
        codes = _int4(blocks, scale).astype(ir.DataType.INT4.numpy())
    return codes.reshape(weight.shape), scale[:, 0].astype(dtype.numpy())


def _stored(scale: npt.NDArray[np.floating], dtype: ir.DataType) -> Matrix:
    """The scale rounded to the dtype, and never 0."""
    rounded: Matrix = np.maximum(scale, np.float32(_LEAST[dtype])).astype(dtype.numpy()).astype(np.float32)
    return rounded


def _int4(blocks: Matrix, scale: Matrix) -> Matrix:
    codes: Matrix = np.clip(np.rint(blocks / scale), -INT4_MAX - 1, INT4_MAX)
    return codes


def _best_scale(blocks: Matrix, largest: Matrix, dtype: ir.DataType) -> Matrix:
    """The scale with the least squared error, of several that clip the outermost values more and more."""
    scales = np.stack([_stored(largest * cut / INT4_MAX, dtype) for cut in CUTS])  # [cuts, G, 1, N]
    errors = [np.square(_int4(blocks, scale) * scale - blocks).sum(1, keepdims=True) for scale in scales]
    best: Matrix = np.take_along_axis(scales, np.argmin(errors, axis=0)[None], 0)[0]
    return best
