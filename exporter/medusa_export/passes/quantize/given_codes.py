"""Codes that a checkpoint brings along, or that were found before, so that weights are not rounded a second time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medusa_export.passes.common.rounding import UINT4_MAX

Array = npt.NDArray[np.generic]
LEAST_BLOCK, MOST_BLOCK = 16, 128  # inputs that share a scale in ONNX Runtime's MatMulNBits: a power of two
RUN = 128  # inputs that its kernels read at once: other blocks at the end of a row are slower, one by one
HALF_RANGE = 128  # the zero of symmetric 8-bit codes


@dataclass(frozen=True)
class GivenCodes:
    """A weight [K, N] in codes: ``(codes - zeros) * scales``, with scales and zeros [K / block_size, N].

    ``parts`` computes codes, scales and, for 4 bits, zeros. If the weight reads sums, it has more inputs after its own: the sum
    of each block of inputs, and then inputs of 0 (`padded_inputs`).
    """

    bits: int
    block_size: int
    parts: Callable[[], Sequence[Array]]
    reads_sums: bool = False


def padded_inputs(num_inputs: int, block_size: int) -> int:
    """The number of inputs of a weight that also reads the sums of its blocks, in whole runs of 128."""
    return -(-(num_inputs + num_inputs // block_size) // RUN) * RUN


def given_codes(make: Callable[[], tuple[Array, Array, Array]], bits: int, block_size: int | None) -> GivenCodes | None:
    """Codes in the form that a bundle stores. None if it cannot hold them.

    Blocks that are larger than an operator takes, or no power of two, are divided into smaller ones with the same scale.

    Args:
        make: computes codes [N, K], scales [N, G] and zeros [N, G].
        bits: of a code.
        block_size: inputs that share a scale; None if they are no runs of equal length.
    """
    if bits not in (4, 8) or block_size is None:
        return None
    size = min(block_size & -block_size, MOST_BLOCK)  # the largest power of two that divides it
    if size < LEAST_BLOCK:
        return None
    _, _, zeros = make()
    if not (_fits_in_4_bits(zeros) if bits == 4 else np.array_equal(zeros, np.full_like(zeros, HALF_RANGE))):
        return None

    def parts() -> list[Array]:
        codes, scales, zeros = make()
        more = block_size // size
        scales, zeros = np.repeat(scales, more, 1).T, np.repeat(zeros, more, 1).T
        if bits == 8:
            return [(codes.astype(np.int16) - HALF_RANGE).astype(np.int8).T, scales]
        return [codes.T, scales, zeros.astype(np.uint8)]

    return GivenCodes(bits, size, parts)


def _fits_in_4_bits(zeros: Array) -> bool:
    numbers = zeros.astype(np.int64)
    return bool(numbers.min() >= 0 and numbers.max() <= UINT4_MAX)
