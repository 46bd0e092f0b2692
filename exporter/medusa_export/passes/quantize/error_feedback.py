"""Rounds weights input by input, so that later inputs make up for the errors of earlier ones (GPTQ, arXiv:2210.17323)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medusa_export.passes.common.rounding import (
    BLOCK_SIZE,
    INT8_MAX,
    UINT4_MAX,
    scales_of_int8,
    to_int8_blocks,
    to_uint4,
)

Matrix = npt.NDArray[np.float32]
DAMPING = 0.01  # of the mean second moment, added to each input's own: few tokens do not show all that inputs can do
RUN = 64  # inputs whose errors are collected before the inputs behind them are corrected


class ErrorFeedback:
    """Rounds the weights that one input is multiplied with.

    Nearest codes are best for each weight alone. These are better for the product with inputs like those that were measured:
    when an input's weights are rounded, the weights of correlated inputs are changed so that the product stays nearly the same.
    Scales and zero points are those of the nearest codes.

    Args:
        moments: sum of x · xᵀ over the measured inputs x. [K, K]
    """

    def __init__(self, moments: Matrix) -> None:
        # what matters most comes first, while the others can make up for it
        self._order = np.argsort(-np.diag(moments), kind="stable")
        self._factor = _feedback(moments[np.ix_(self._order, self._order)].astype(np.float64))

    def to_int8(self, weight: Matrix) -> tuple[npt.NDArray[np.int8], Matrix]:
        """Codes in -127…127 [K, N], and scales [N]; the weight [K, N] is about code x scale."""
        scale = scales_of_int8(weight, 0)
        return self._codes(weight, scale[None], np.zeros_like(scale[None]), (-INT8_MAX, INT8_MAX)).astype(np.int8), scale

    def to_int8_blocks(self, weight: Matrix, block: int = BLOCK_SIZE) -> tuple[npt.NDArray[np.int8], Matrix]:
        """As `rounding.to_int8_blocks`."""
        _, scales = to_int8_blocks(weight, block)
        return self._codes(weight, scales, np.zeros_like(scales), (-INT8_MAX, INT8_MAX)).astype(np.int8), scales

    def to_uint4(self, weight: Matrix) -> tuple[npt.NDArray[np.uint8], Matrix, npt.NDArray[np.uint8]]:
        """As `rounding.to_uint4` with blocks of 32 inputs."""
        _, scales, zeros = to_uint4(weight, BLOCK_SIZE)
        return self._codes(weight, scales, zeros.astype(np.float32), (0, UINT4_MAX)).astype(np.uint8), scales, zeros

    def _codes(self, weight: Matrix, scales: Matrix, zeros: Matrix, limits: tuple[int, int]) -> Matrix:
        """Codes [K, N]; the weight is about (code - zero) x scale. scales and zeros: [G, N], one for each K / G inputs."""
        size, factor = len(weight) // len(scales), self._factor
        left = weight[self._order]  # what is still to be rounded. [K, N]
        codes = np.empty_like(left)
        for start in range(0, len(weight), RUN):
            run = left[start : start + RUN]
            errors = np.empty_like(run)
            for row, place in enumerate(range(start, start + len(run))):
                input_ = self._order[place]
                scale, zero = scales[input_ // size], zeros[input_ // size]
                codes[input_] = np.clip(np.rint(run[row] / scale) + zero, *limits)
                errors[row] = (run[row] - (codes[input_] - zero) * scale) / factor[place, place]
                run[row + 1 :] -= np.outer(factor[place, place + 1 : start + len(run)], errors[row])
            left[start + len(run) :] -= factor[start : start + len(run), start + len(run) :].T @ errors
        return codes


def _feedback(moments: npt.NDArray[np.float64]) -> Matrix:
    """How the error of each input is passed on to those after it: the Cholesky factor of the inverse moments. [K, K]"""
    damping = max(DAMPING * float(np.diag(moments).mean()), float(np.finfo(np.float32).tiny))
    inverse = np.linalg.inv(moments + damping * np.eye(len(moments)))
    upper: Matrix = np.linalg.cholesky((inverse + inverse.T) / 2, upper=True).astype(np.float32)
    return upper
