"""Helpers for the values of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

SQUARE = 256  # rows and columns of a part of a matrix that stays in the processor's cache


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    """A tensor's shape."""
    return ir.Shape([size for size in tensor.shape if isinstance(size, int)])


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor as an initializer of the graph, under the given name."""
    value = ir.Value(name=name, shape=shape_of(tensor), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, data: float | Sequence[int] | np.generic | npt.NDArray[np.generic]) -> ir.Value:
    """A small constant of the graph, created once. Floats become float32, ints int64; NumPy data keeps its type.

    If the name is taken by other data, which may be the model's own, the constant gets a name of its own.
    """
    if not isinstance(data, np.generic | np.ndarray):
        data = np.array(data, np.float32 if isinstance(data, float) else np.int64)
    tensor = ir.tensor(np.asarray(data), name=name)
    while (known := graph.initializers.get(name)) is not None:
        if _is_equal(known.const_value, tensor):
            return known
        name = tensor.name = f"{name}_"
    return add_initializer(graph, name, tensor)


def _is_equal(known: ir.TensorProtocol | None, tensor: ir.TensorProtocol) -> bool:
    return (
        known is not None
        and (known.dtype, shape_of(known)) == (tensor.dtype, shape_of(tensor))
        and known.tobytes() == tensor.tobytes()
    )


def lazy_tensor(
    name: str, dtype: ir.DataType, shape: Sequence[int | ir.SymbolicDim], make: Callable[[], npt.NDArray[np.generic]]
) -> ir.LazyTensor:
    """A tensor that is computed when it is written, so that at most one is in memory."""

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()).view(dtype.numpy()), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)


class Together:
    """Computes several parts of a tensor at once when the first is needed, and forgets each once it was taken.

    Args:
        make: computes the parts.
    """

    def __init__(self, make: Callable[[], Sequence[npt.NDArray[np.generic]]]) -> None:
        self._make = make
        self._parts: dict[int, npt.NDArray[np.generic]] = {}

    def part(self, place: int) -> npt.NDArray[np.generic]:
        """One of the parts. A part that was taken before is computed again, with the others."""
        if place not in self._parts:
            self._parts = dict(enumerate(self._make()))
        return self._parts.pop(place)


def transposed(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A matrix turned, as new memory. Square by square, which is three times as fast as all at once."""
    rows, columns = array.shape
    result = np.empty((columns, rows), array.dtype)
    for row in range(0, rows, SQUARE):
        for column in range(0, columns, SQUARE):
            part = array[row : row + SQUARE, column : column + SQUARE]
            result[column : column + SQUARE, row : row + SQUARE] = part.T
    return result


def replace(old: ir.Value, new: ir.Value) -> None:
    """Redirect every reader of `old` to `new`, which has the same type and shape.

    If `old` is a graph output, `new` takes over its name.
    """
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.before", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def heads_and_width(value: ir.Value | None) -> tuple[int, int]:
    """H and D of a value [B, H, T, D]. Both must be known."""
    assert value is not None
    assert value.shape is not None
    heads, width = value.shape[1], value.shape[3]
    assert isinstance(heads, int)
    assert isinstance(width, int)
    return heads, width
