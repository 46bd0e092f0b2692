"""Finds the residual stream of a step graph, and everything that reads or writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.linears import Linear, gathers_rows, linear_of
from medusa_export.passes.quantize.orthogonal import Array

UNCHANGED = frozenset({"Identity"})
ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {"Add": np.add, "Mul": np.multiply}
SELECTS_ROWS = frozenset({"Gather", "GatherElements"})


class NotExactError(Exception):
    """The stream cannot be rotated without changing what the model computes. The message says why."""


@dataclass(frozen=True)
class Read:
    """A linear layer that reads the stream, with the gain [C] of the norm between them, if there is one."""

    linear: Linear
    gain: ir.Value | None


@dataclass(frozen=True)
class Output:
    """A value of the stream that the graph returns, with the gain [C] of the norm before it, if there is one."""

    value: ir.Value
    gain: ir.Value | None


@dataclass
class ResidualStream:
    """The values [.., C] between a model's layers, and what reads and writes them.

    All of it commutes with an orthogonal matrix R: if tables, writers and biases are multiplied with R and readers with its
    transpose, then each value x of the stream becomes x · R and the rest of the graph stays as it was.
    """

    width: int
    tables: list[ir.Node] = field(default_factory=list)  # Gather
    writers: list[Linear] = field(default_factory=list)
    biases: list[tuple[ir.Node, int]] = field(default_factory=list)  # Add, and which of its inputs is the bias [C]
    readers: list[Read] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)  # RMSNormalization; their gains move into what follows
    outputs: list[Output] = field(default_factory=list)


def residual_stream(graph: ir.Graph) -> ResidualStream:
    """Follow the stream from the embeddings of `input_ids` through the graph.

    Raises:
        NotExactError: something reads or writes the stream that does not commute with a rotation.
    """
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    starts = [usage.node for usage in ids.uses() if gathers_rows(usage.node) and usage.idx == 1]
    if not starts:
        raise NotExactError("the embeddings of the tokens are not rows of one table")
    width = starts[0].outputs[0].shape[-1] if starts[0].outputs[0].shape is not None else None
    if not isinstance(width, int):
        raise NotExactError("the width of the embeddings is unknown")
    search = _Search(ResidualStream(width))
    search.join(starts[0].outputs[0])
    search.run()
    return search.found


class _Search:
    """Adds values to the stream until whatever touches it is known."""

    def __init__(self, found: ResidualStream) -> None:
        self.found = found
        self._stream: set[ir.Value] = set()
        self._pending: list[ir.Value] = []

    def join(self, value: ir.Value) -> None:
        """Add a value to the stream."""
        if value not in self._stream:
            self._stream.add(value)
            self._pending.append(value)

    def run(self) -> None:
        """Visit producers and readers of all values."""
        while self._pending:
            value = self._pending.pop()
            self._written(value)
            self._read(value, None)

    def _written(self, value: ir.Value) -> None:
        """What computes a value of the stream must be able to compute it rotated."""
        node = value.producer()
        if node is None:
            raise NotExactError("an input of the graph is a part of the stream")
        linear = linear_of(node)
        if linear is not None and linear.num_outputs == self.found.width and node.op_type == "MatMul":
            self.found.writers.append(linear)
        elif gathers_rows(node) and node.inputs[0] is not None and node.inputs[0].is_initializer():
            self.found.tables.append(node)
        elif node.op_type == "Add":
            self._added(node)
        elif (source := _carried(node)) is not None:
            self.join(source)
        elif node.op_type.endswith("Normalization"):
            raise NotExactError("a norm after a block writes the stream, channel by channel")
        else:
            raise NotExactError(f"the operator {node.op_type} writes the stream")

    def _added(self, node: ir.Node) -> None:
        for place, each in enumerate(node.inputs):
            assert each is not None
            if _is_vector(each, self.found.width):
                self.found.biases.append((node, place))
            else:
                self.join(each)

    def _read(self, value: ir.Value, gain: ir.Value | None, *, after_norm: bool = False) -> None:
        """What reads a value must be able to read it rotated. After a norm, its gain moves on to the linear layers."""
        if value.is_graph_output():
            self.found.outputs.append(Output(value, gain))
        for usage in value.uses():
            node, linear = usage.node, linear_of(usage.node)
            if linear is not None and usage.idx == 0:
                self.found.readers.append(Read(linear, gain))
            elif node.op_type == "Shape":
                continue
            elif after_norm:
                if _carried(node) is not value:
                    raise NotExactError(f"the operator {node.op_type} reads the stream after a norm")
                self._read(node.outputs[0], gain, after_norm=True)
            elif node.op_type == "Add" or _carried(node) is value:
                self.join(node.outputs[0])
            elif node.op_type == "RMSNormalization" and usage.idx == 0:
                self._norm(node)
            elif node.op_type == "LayerNormalization":
                raise NotExactError("LayerNormalization subtracts the mean of the channels")
            else:
                raise NotExactError(f"the operator {node.op_type} reads the stream")

    def _norm(self, node: ir.Node) -> None:
        gain = node.inputs[1]
        gains = None if gain is None else constant_numbers(gain)
        if gains is None or gains.shape != (self.found.width,) or node.attributes.get_int("axis", -1) not in (-1, 2):
            raise NotExactError("the gains of a norm are not one constant number a channel")
        self.found.norms.append(node)
        self._read(node.outputs[0], gain, after_norm=True)


def constant_numbers(value: ir.Value) -> Array | None:
    """A constant, or what is computed from constants element by element, such as the gains 1 + w; None for other values."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    node = value.producer()
    if node is None or node.op_type not in ELEMENTWISE:
        return None
    numbers = [None if each is None else constant_numbers(each) for each in node.inputs]
    known = [array for array in numbers if array is not None]
    return ELEMENTWISE[node.op_type](*known) if len(known) == len(numbers) else None


def _is_vector(value: ir.Value, width: int) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tuple(tensor.shape) == (width,)


def _carried(node: ir.Node) -> ir.Value | None:
    """The value whose rows [.., C] a node gives as they are, scaled by one number, or in part."""
    return node.inputs[0] if node.op_type in UNCHANGED or _selects_rows(node) else _scaled(node)


def _scaled(node: ir.Node) -> ir.Value | None:
    """The value that a node multiplies by one number, or divides by it."""
    if node.op_type not in ("Mul", "Div"):
        return None
    first, second = node.inputs
    if second is not None and _is_number(second):
        return first
    return second if node.op_type == "Mul" and first is not None and _is_number(first) else None


def _is_number(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1


def _selects_rows(node: ir.Node) -> bool:
    """Whether a node picks rows [.., C] of its first input, each as a whole."""
    value = node.inputs[0] if node.inputs else None
    if node.op_type not in SELECTS_ROWS or value is None or value.shape is None or value.is_initializer():
        return False
    axis = node.attributes.get_int("axis", 0)
    if axis % len(value.shape) == len(value.shape) - 1:
        return False
    return node.op_type == "Gather" or _is_repeated(node.inputs[1])


def _is_repeated(indices: ir.Value | None) -> bool:
    """Whether the indices of a ``GatherElements`` are the same for all channels: expanded from one."""
    node = None if indices is None else indices.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Expand" else None
    return source is not None and source.shape is not None and source.shape[-1] == 1
