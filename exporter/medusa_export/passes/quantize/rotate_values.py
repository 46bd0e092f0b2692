"""Rotates the values of each attention head (QuaRot's R2, arXiv:2404.00456)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.attention_math import is_attention
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.linears import Linear, linear_of
from medusa_export.passes.common.values import heads_and_width
from medusa_export.passes.quantize.orthogonal import random_rotation, rotated
from medusa_export.passes.quantize.residual_stream import NotExactError
from medusa_export.passes.quantize.weight_edits import WeightEdits

TURN = (0, 2, 1, 3)  # [B, T, H, D] and [B, H, T, D]


class RotateValues(GraphPass):
    """Multiply the values of each head with an orthogonal matrix, by changing weights alone.

    Needs: attention whose values come from a linear layer alone, and whose result only the output projection reads.
    Result: the same graph except for rounding. Values in the cache are rotated, the value projection is multiplied with R head
    by head, and the output projection with its transpose. Attention that is written in another way stays as it was.

    Args:
        seed: of R.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        rng = np.random.default_rng(self.seed)
        edits, count = WeightEdits(), 0
        for node in [node for node in model.graph if is_attention(node)]:
            try:
                _add(edits, _Values.of(node), rng)
            except NotExactError as error:
                self.decline(str(error))
                continue
            count += 1
        edits.apply(model.graph)
        return count


@dataclass(frozen=True)
class _Values:
    """The values of one attention: what writes them, and what reads the result."""

    width: int  # D
    writer: Linear
    bias: tuple[ir.Node, int] | None  # Add, and which of its inputs is the bias [H · D]
    reader: Linear

    @classmethod
    def of(cls, attention: ir.Node) -> _Values:
        present = attention.inputs[2]
        assert present is not None
        _, width = heads_and_width(present)
        scatter = _producer(present, "TensorScatter", "the values do not go through the cache as they are")
        if len(present.uses()) > 1:
            raise NotExactError("several layers read the same values")
        turned = _producer(_only(scatter.inputs[1]), "Transpose", "the values are changed before they are cached")
        shaped = _producer(_only(turned.inputs[0]), "Reshape", "the values are changed before they are cached")
        node, bias = _only(shaped.inputs[0]).producer(), None
        if node is not None and node.op_type == "Add":
            places = [place for place, value in enumerate(node.inputs) if value is not None and value.is_initializer()]
            bias = (node, places[0]) if len(places) == 1 else None
            node = _only(node.inputs[1 - places[0]]).producer() if bias is not None else None
        writer = None if node is None else linear_of(node)
        if writer is None or turned.attributes.get_ints("perm", ()) != TURN or _last(turned.inputs[0]) != width:
            raise NotExactError("the values do not come from a linear layer")
        back = _reader(attention.outputs[0], "Transpose")
        if back.attributes.get_ints("perm", ()) != TURN:
            raise NotExactError("something other than the output projection reads the result")
        output = _reader(_reader(back.outputs[0], "Reshape").outputs[0], "MatMul")
        reader = linear_of(output)
        heads, _ = heads_and_width(attention.outputs[0])
        if reader is None or reader.num_inputs != heads * width:
            raise NotExactError("something other than the output projection reads the result")
        return cls(width, writer, bias, reader)


def _add(edits: WeightEdits, values: _Values, rng: np.random.Generator) -> None:
    owned = [values.writer, values.reader]
    if any(len(linear.weight.uses()) > 1 or linear.node.op_type == "Gemm" for linear in owned):
        raise NotExactError("other layers read the same weight")
    rotation = random_rotation(values.width, rng)
    written, read = 1 - values.writer.input_axis, values.reader.input_axis
    edits.add_linear(values.writer, "values", lambda array: rotated(array, rotation, written))
    edits.add_linear(values.reader, "values", lambda array: rotated(array, rotation, read))
    if values.bias is not None:
        edits.add(*values.bias, "values", lambda array: rotated(array, rotation, 0))


def _producer(value: ir.Value | None, op_type: str, reason: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise NotExactError(reason)
    return node


def _only(value: ir.Value | None) -> ir.Value:
    """A value that nothing else reads."""
    assert value is not None
    if len(value.uses()) > 1 or value.is_graph_output():
        raise NotExactError("something else reads the values before they are cached")
    return value


def _reader(value: ir.Value, op_type: str) -> ir.Node:
    """The one node that reads a value."""
    nodes = [usage.node for usage in value.uses()]
    if len(nodes) != 1 or nodes[0].op_type != op_type or value.is_graph_output():
        raise NotExactError("something other than the output projection reads the result")
    return nodes[0]


def _last(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None
