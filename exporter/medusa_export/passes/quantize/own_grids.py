"""Finds the grids of 16 values that weights lie on already, as in GGUF files of 4 bits, so that 4 bits lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.linears import Linear, linears
from medusa_export.passes.common.rounding import BLOCK_SIZE, UINT4_MAX, to_uint4
from medusa_export.passes.quantize.given_codes import Array, GivenCodes, padded_inputs
from medusa_export.passes.quantize.integer_weights import Storage

Matrix = npt.NDArray[np.float32]
NEAR = np.float32(0.02)  # of a step: how far a weight may be from its place on the grid. Weights in float16 are off by 0.007
MOST_STEPS = 7  # of the smallest gap between two values; two gaps of more than 7 steps need more than 16 places
SAMPLE = 4  # outputs that are looked at first: weights that lie on no grid are told apart by a few blocks
FIRST = 3  # weights that tell whether a model's lie on grids
CHUNK = 1 << 22  # weights that are looked at together, so that memory stays small


@dataclass(frozen=True)
class Grid:
    """Where weights [K, N] lie: ``(code - zero) * step + rest``, with 16 codes, and the others for each block of 32 inputs.

    A zero point is a whole number, and the rest is what it leaves. It is the same for all weights of a block, so it adds itself
    times the sum of the block's inputs to the product.
    """

    codes: npt.NDArray[np.uint8]  # [K, N], 0…15
    steps: Matrix  # [G, N]
    zeros: npt.NDArray[np.uint8]  # [G, N], 0…15
    rests: Matrix  # [G, N]

    @property
    def has_rests(self) -> bool:
        """Whether zero points alone do not give the weights."""
        return bool((np.abs(self.rests) > NEAR * self.steps).any())


def find_grid(weight: Matrix) -> Grid | None:
    """The grid that a weight [K, N] lies on; None if some block of 32 inputs has no 16 places in equal steps."""
    num_inputs, num_outputs = weight.shape
    if num_inputs % BLOCK_SIZE or _fitted(weight[:, :SAMPLE]) is None:
        return None
    size = max(1, CHUNK // num_inputs)
    found = []
    for start in range(0, num_outputs, size):
        grid = _fitted(weight[:, start : start + size])
        if grid is None:
            return None
        found.append(grid)
    parts = zip(*((grid.codes, grid.steps, grid.zeros, grid.rests) for grid in found), strict=True)
    return Grid(*(np.concatenate(part, axis=1) for part in parts))


def own_grids(graph: ir.Graph, storage: Callable[[str], Storage]) -> dict[str, GivenCodes]:
    """The codes of all weights of linear layers that are to have 4 bits and lie on a grid, by name.

    Args:
        graph: a float32 graph.
        storage: how each weight is to be stored, by its name.
    """
    found: dict[str, GivenCodes] = {}
    for linear in linears(graph):
        name = linear.weight.name or ""
        if storage(name) != "int4" or name in found:
            continue
        if (grid := find_grid(linear.numbers())) is not None:
            found[name] = GivenCodes(4, BLOCK_SIZE, partial(_parts, linear), reads_sums=grid.has_rests)
    return found


def has_grids(graph: ir.Graph) -> bool:
    """Whether one of the first weights of a float32 graph lies on a grid, so that others will, too."""
    return any(find_grid(linear.numbers()) is not None for linear in islice(linears(graph), FIRST))


def _parts(linear: Linear) -> list[Array]:
    """Codes, scales and zero points of a weight. If it has rests, more inputs follow: the rests, for the sums of the blocks."""
    grid = find_grid(linear.numbers())
    assert grid is not None
    if not grid.has_rests:
        return [grid.codes, grid.steps, grid.zeros]
    more = padded_inputs(linear.num_inputs, BLOCK_SIZE) - linear.num_inputs
    codes, steps, zeros = to_uint4(np.pad(grid.rests, ((0, more - len(grid.rests)), (0, 0))))
    return [np.concatenate((grid.codes, codes)), np.concatenate((grid.steps, steps)), np.concatenate((grid.zeros, zeros))]


def _fitted(weight: Matrix) -> Grid | None:
    """The grid of a part of a weight that fits in memory several times."""
    num_inputs, num_outputs = weight.shape
    blocks = np.ascontiguousarray(weight.T).reshape(-1, BLOCK_SIZE)  # [N · G, 32]
    codes = _places(blocks)
    if codes is None:
        return None
    means = codes.mean(1, keepdims=True)
    spread = np.square(codes - means).sum(1, keepdims=True)
    flat = spread[:, 0] == 0
    # the line through the places by least squares; a block of one value takes a step of that size
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = ((codes - means) * blocks).sum(1, keepdims=True) / spread
    steps[flat] = np.abs(blocks[flat, :1])
    steps[steps == 0] = 1
    codes[flat] = blocks[flat] > 0
    bases = blocks.mean(1, keepdims=True) - steps * codes.mean(1, keepdims=True)  # the value of code 0
    zeros = np.clip(np.rint(-bases / steps), 0, UINT4_MAX)
    rests = bases + zeros * steps

    def by_output(column: Matrix) -> Matrix:
        return np.ascontiguousarray(column.reshape(num_outputs, -1).T)

    whole = np.ascontiguousarray(codes.reshape(num_outputs, num_inputs).T).astype(np.uint8)
    return Grid(whole, by_output(steps), by_output(zeros).astype(np.uint8), by_output(rests))


def _places(blocks: Matrix) -> Matrix | None:
    """The place of each weight on its block's grid, counted from the block's lowest; None if a block has no grid. [M, 32]"""
    low = blocks.min(1, keepdims=True)
    ranges = blocks.max(1, keepdims=True) - low
    gaps = np.diff(np.sort(blocks, axis=1), axis=1)
    least = np.where(gaps > ranges * (NEAR / UINT4_MAX), gaps, np.inf).min(1, keepdims=True)  # the least gap of two values
    places = np.zeros_like(blocks)
    left = np.flatnonzero(ranges[:, 0] != 0)  # NaN and infinity have no place, so they stay
    for parts in range(1, MOST_STEPS + 1):
        if not left.size:
            break
        number = np.rint(ranges[left] * parts / least[left])  # of steps from the lowest to the highest
        exact = (blocks[left] - low[left]) * (number / ranges[left])
        near = np.rint(exact)
        fits = ((np.abs(exact - near) <= NEAR).all(1)) & (number[:, 0] <= UINT4_MAX)
        places[left[fits]] = near[fits]
        left = left[~fits]
    return None if left.size else places
