"""MatMuls with a weight, as a trace writes linear layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.values import replace

MIN_SIZE = 4096  # elements; a smaller weight is not worth quantising
LOGITS = frozenset({"greedy_ids", "logits", "head_log_probs"})  # outputs of the step and of the heads that come from logits
FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class Linear:
    """A ``MatMul`` or ``Gemm`` with a weight that is an initializer.

    Args:
        node: the MatMul or Gemm.
        weight: the initializer.
        transposed: whether the weight is stored as [out, in].
        reader: the node that reads the initializer: `node` itself, or a Transpose before it.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    reader: ir.Node

    @property
    def input_axis(self) -> int:
        """The weight's axis of the inputs."""
        return 1 if self.transposed else 0

    @property
    def num_inputs(self) -> int:
        """K, the number of inputs."""
        return _size(self.weight, self.input_axis)

    @property
    def num_outputs(self) -> int:
        """N, the number of outputs."""
        return _size(self.weight, 1 - self.input_axis)

    def numbers(self) -> npt.NDArray[np.float32]:
        """The weight as [K, N]. It is read or computed at each call."""
        assert self.weight.const_value is not None
        array: npt.NDArray[np.float32] = self.weight.const_value.numpy()
        return array.T if self.transposed else array

    @property
    def reads_alone(self) -> bool:
        """Whether no other node reads the weight, or its transpose."""
        stored = self.node.inputs[1]
        return stored is not None and len(stored.uses()) == len(self.weight.uses()) == 1


def linears(graph: ir.Graph, dtypes: Collection[ir.DataType] = (ir.DataType.FLOAT,)) -> Iterator[Linear]:
    """The graph's linear layers with weights of the given types and of at least `MIN_SIZE` elements, in order."""
    for node in graph:
        if (linear := linear_of(node, dtypes, MIN_SIZE)) is not None:
            yield linear


def linear_of(node: ir.Node, dtypes: Collection[ir.DataType] = (ir.DataType.FLOAT,), min_size: int = 1) -> Linear | None:
    """The linear layer that a node computes; None if it is another node, or its weight has another type or is smaller."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    weight, reader = node.inputs[1], node
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    assert weight is not None
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose":
        weight, reader, transposed = producer.inputs[0], producer, not transposed
    if not is_weight(weight, dtypes, min_size):
        return None
    assert weight is not None
    return Linear(node, weight, transposed, reader)


def is_weight(value: ir.Value | None, dtypes: Collection[ir.DataType] = (ir.DataType.FLOAT,), min_size: int = MIN_SIZE) -> bool:
    """Whether a value is an initializer [·, ·] of one of the types and of at least `min_size` elements."""
    tensor = None if value is None else value.const_value
    return (
        tensor is not None
        and value is not None
        and value.is_initializer()
        and len(tensor.shape) == 2
        and tensor.dtype in dtypes
        and tensor.size >= min_size
    )


def gathers_rows(node: ir.Node) -> bool:
    """Whether a node looks up rows of its first input, as an embedding does."""
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0


def lm_heads(graph: ir.Graph) -> set[ir.Value]:
    """The weights of the LM heads: of the last linear layers before the outputs that are logits or made of them.

    Found by the graph's structure, so that every bundle's graphs will do, whatever their weights are called.
    """
    by_node = {linear.node: linear.weight for linear in linears(graph, FLOAT_TYPES)}
    found: set[ir.Value] = set()
    pending = [output for output in graph.outputs if output.name in LOGITS]
    passed: set[ir.Node] = set()
    while pending:
        node = pending.pop().producer()
        if node is None or node in passed:
            continue
        passed.add(node)
        if node.op_type not in ("MatMul", "Gemm"):
            pending += [value for value in node.inputs if value is not None]
        elif node in by_node:
            found.add(by_node[node])
    return found


def gemm_to_matmul(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace ``Gemm(x, weight, bias)`` by a MatMul and an Add, if it does nothing else. Returns whether it was replaced."""
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    weight = node.inputs[1]
    if not plain or node.attributes.get_int("transA", 0) != 0 or not is_weight(weight):
        return False
    tape = ir.tape.Tape()
    if node.attributes.get_int("transB", 0):
        assert weight is not None
        weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
    result = tape.op("MatMul", [node.inputs[0], weight])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = tape.op("Add", [result, node.inputs[2]])
    graph.insert_before(node, tape.nodes)
    replace(node.outputs[0], result)
    graph.remove(node, safe=True)
    return True


def _size(weight: ir.Value, axis: int) -> int:
    assert weight.const_value is not None
    return int(weight.const_value.shape[axis])  # type: ignore[arg-type]
