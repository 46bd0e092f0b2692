"""Rounds weights input by input, so that later inputs make up for the errors of earlier ones (GPTQ, arXiv:2210.17323)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medusa_export.passes.common.rounding import INT8_MAX, scales_of_int8

Matrix = npt.NDArray[np.float32]
DAMPING = 0.01  # of the mean second moment, added to each input's own: few tokens do not show all that inputs can do
BLOCK = 64  # inputs whose errors are collected before the inputs behind them are corrected


def to_int8_for(weight: Matrix, moments: Matrix) -> tuple[npt.NDArray[np.int8], Matrix]:
    """Codes in -127…127 [K, N], and scales [N]; the weight [K, N] is about code x scale.

    Nearest codes are best for each weight alone. These are better for the product with inputs like those that were measured:
    when an input's weights are rounded, the weights of correlated inputs are changed so that the product stays nearly the same.

    Args:
        weight: [K, N].
        moments: sum of x · xᵀ over the measured inputs x. [K, K]
    """
    scale = scales_of_int8(weight, 0)
    order = np.argsort(-np.diag(moments), kind="stable")  # what matters most comes first, while the others can make up for it
    left = weight[order]  # what is still to be rounded. [K, N]
    feedback = _feedback(moments[np.ix_(order, order)].astype(np.float64))
    codes = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), BLOCK):
        block = left[start : start + BLOCK]
        errors = np.empty_like(block)
        for row, place in enumerate(range(start, start + len(block))):
            found = np.clip(np.rint(block[row] / scale), -INT8_MAX, INT8_MAX)
            codes[order[place]] = found
            errors[row] = (block[row] - found * scale) / feedback[place, place]
            block[row + 1 :] -= np.outer(feedback[place, place + 1 : start + len(block)], errors[row])
        left[start + len(block) :] -= feedback[start : start + len(block), start + len(block) :].T @ errors
    return codes, scale


def _feedback(moments: npt.NDArray[np.float64]) -> Matrix:
    """How the error of each input is passed on to those after it: the Cholesky factor of the inverse moments. [K, K]"""
    damping = max(DAMPING * float(np.diag(moments).mean()), float(np.finfo(np.float32).tiny))
    inverse = np.linalg.inv(moments + damping * np.eye(len(moments)))
    upper: Matrix = np.linalg.cholesky((inverse + inverse.T) / 2, upper=True).astype(np.float32)
    return upper
