"""Orthogonal matrices that spread every channel over all others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def random_rotation(width: int, rng: np.random.Generator) -> Array:
    """An orthogonal matrix R whose elements are of similar size: random signs, then a Kronecker product. [N, N]

    The product is of a Hadamard matrix, as far as N is a power of two, and of a random matrix for the odd rest. The signs come
    first, so that a mean that all channels share is spread as well.
    """
    two = width & -width  # the largest power of two that divides it
    mixed = np.kron(_hadamard(two), _random_orthogonal(width // two, rng))
    signs = rng.choice(np.array([-1.0, 1.0]), width)
    rotation: Array = (signs[:, None] * mixed).astype(np.float32)
    return rotation


def rotated(array: Array, rotation: Array, axis: int) -> Array:
    """Multiply the vectors along an axis with R: each x becomes x · R. The axis may hold several vectors, one after another.

    A weight W of a layer that reads rotated activations becomes Rᵀ · W, and one that writes them W · R. Both are this product,
    along the weight's axis of the rotated channels.
    """
    moved = np.moveaxis(array, axis, -1)
    product = moved.reshape(-1, len(rotation)) @ rotation
    return np.ascontiguousarray(np.moveaxis(product.reshape(moved.shape), -1, axis))


def _hadamard(size: int) -> npt.NDArray[np.float64]:
    """The orthogonal Hadamard matrix of a power of two (Sylvester's construction)."""
    matrix: npt.NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    normal: npt.NDArray[np.float64] = matrix / np.sqrt(size)
    return normal


def _random_orthogonal(size: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """An orthogonal matrix, evenly distributed over all of them."""
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    signed: npt.NDArray[np.float64] = q * np.sign(np.diag(r))
    return signed
