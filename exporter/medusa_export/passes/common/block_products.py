"""Multiplies with weights in blocks by the operator of ONNX Runtime that reads them as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import add_initializer, constant, replace

BITS = {ir.DataType.UINT4: 4, ir.DataType.UINT8: 8}


class BlockProducts(GraphPass):
    """Replace products with weights in blocks by ``MatMulNBits``.

    Needs: ``MatMul(x, Transpose(DequantizeLinear(codes, scales, zeros)))`` as `QuantizeWeights` writes it: codes [N, K] are
    uint8 around 128, or uint4 with zero points.
    Result: ``MatMulNBits``. It reads the same bytes; only their shape is told otherwise. Zeros that fill the last block of x
    are left out: the operator needs none. If there are more, the ``Concat`` in front of the ``Pad`` appends them too, so that
    there is one operator less.

    Args:
        accuracy_level: how precisely the operator multiplies: 1 for float32; 4 for activations in 8 bits, each row on its own.
    """

    def __init__(self, accuracy_level: int) -> None:
        super().__init__()
        self._accuracy_level = accuracy_level

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        views: dict[ir.Value, ir.Value] = {}
        padded = _Padded(model.graph)
        count = 0
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            stored = _stored(node.inputs[1])
            if stored is None:
                continue
            weights = [_codes(model.graph, views, stored), stored.scales]
            if stored.zeros is not None:
                weights.append(_zeros(model.graph, views, stored))
            x, num_inputs = padded.input(node, stored)
            attributes = {
                "K": num_inputs,
                "N": stored.num_outputs,
                "bits": stored.bits,
                "block_size": stored.block_size,
                "accuracy_level": self._accuracy_level,
            }
            product = ir.node("MatMulNBits", [x, *weights], attributes, domain="com.microsoft")
            model.graph.insert_before(node, product)
            replace(node.outputs[0], product.outputs[0])
            model.graph.remove(node, safe=True)
            count += 1
        if count:
            model.opset_imports["com.microsoft"] = 1
        return count


@dataclass(frozen=True)
class _Blocks:
    """A weight in blocks: codes [N, K], scales [N, G], and zeros [N, G] or None for 8 bits."""

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    block_size: int

    @property
    def bits(self) -> int:
        assert self.codes.dtype is not None
        return BITS[self.codes.dtype]

    @property
    def num_outputs(self) -> int:
        return _sizes(self.codes)[0]

    @property
    def num_inputs(self) -> int:
        return _sizes(self.codes)[1]

    @property
    def num_blocks(self) -> int:
        return self.num_inputs // self.block_size


def _stored(weight: ir.Value | None) -> _Blocks | None:
    turn = None if weight is None else weight.producer()
    if turn is None or turn.op_type != "Transpose" or turn.inputs[0] is None:
        return None
    source = turn.inputs[0].producer()
    if source is None or source.op_type != "DequantizeLinear" or not source.attributes.get_int("block_size", 0):
        return None
    codes, scales, zeros = source.inputs
    if codes is None or scales is None or not (codes.is_initializer() and scales.is_initializer()):
        return None  # codes that are gathered first, as those of experts
    return _Blocks(codes, scales, zeros if codes.dtype == ir.DataType.UINT4 else None, source.attributes.get_int("block_size"))


class _Padded:
    """The inputs of products to which a ``Pad`` appends zeros, without it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._joined: dict[ir.Value, ir.Value] = {}  # by what the `Pad` gives
        self._zeros: dict[tuple[int, str], ir.Value] = {}  # by their number and the shape in front of it

    def input(self, product: ir.Node, stored: _Blocks) -> tuple[ir.Value | None, int]:
        """What a product reads, and its width."""
        x, width = product.inputs[0], stored.num_inputs
        pad = None if x is None else x.producer()
        if pad is None or pad.op_type != "Pad" or pad.attributes.get_string("mode", "constant") != "constant":
            return x, width
        told = pad.inputs[1].const_value if pad.inputs[1] is not None and len(pad.inputs) == 2 else None
        ends = None if told is None else told.numpy()
        if ends is None or ends[:-1].any() or ends[-1] < 0:
            return x, width
        count, inner = int(ends[-1]), pad.inputs[0]
        if count < stored.block_size:
            return inner, width - count
        join = None if inner is None else inner.producer()
        if join is None or join.op_type != "Concat" or join.attributes.get_int("axis") != -1 or join.inputs[0] is None:
            return x, width
        assert x is not None
        if x not in self._joined:
            result = ir.node("Concat", [*join.inputs, self._zeros_like(join.inputs[0], count, product)], {"axis": -1})
            result.outputs[0].shape, result.outputs[0].type = x.shape, x.type
            self._graph.insert_before(product, result)
            self._joined[x] = result.outputs[0]
        return self._joined[x], width

    def _zeros_like(self, x: ir.Value, count: int, before: ir.Node) -> ir.Value:
        """Zeros [..., count] for a value [..., K]. Values of the same leading sizes share them."""
        leading = str(x) if x.shape is None or None in x.shape.dims else str(x.shape[:-1])
        if (count, leading) not in self._zeros:
            tape = ir.tape.Tape()
            sizes = tape.op("Shape", [x], {"end": -1})
            shape = tape.op("Concat", [sizes, constant(self._graph, f"size_{count}", [count])], {"axis": 0})
            zeros = constant(self._graph, f"zeros_{count}", np.zeros(count, np.float32))
            self._zeros[count, leading] = tape.op("Expand", [zeros, shape])
            self._graph.insert_before(before, tape.nodes)
        return self._zeros[count, leading]


def _codes(graph: ir.Graph, views: dict[ir.Value, ir.Value], stored: _Blocks) -> ir.Value:
    """The codes as ``MatMulNBits`` wants them: [N, G, bytes of a block]."""
    if stored.codes not in views:
        tensor = stored.codes.const_value
        assert tensor is not None
        shape = [stored.num_outputs, stored.num_blocks, stored.block_size * stored.bits // 8]
        views[stored.codes] = add_initializer(graph, f"{stored.codes.name}.blocks", _as_bytes(tensor, shape))
    return views[stored.codes]


def _zeros(graph: ir.Graph, views: dict[ir.Value, ir.Value], stored: _Blocks) -> ir.Value:
    """The zero points of 4-bit codes, two in a byte: [N, bytes of a row]. Each row begins with a byte of its own."""
    zeros = stored.zeros
    assert zeros is not None
    if zeros not in views:
        tensor, shape = zeros.const_value, [stored.num_outputs, (stored.num_blocks + 1) // 2]
        assert tensor is not None
        name = f"{zeros.name}.bytes"
        if stored.num_blocks % 2:
            padded = np.pad(tensor.numpy().astype(np.uint8), ((0, 0), (0, 1)))
            views[zeros] = add_initializer(graph, name, ir.tensor(padded[:, ::2] | padded[:, 1::2] << 4, name=name))
        else:
            views[zeros] = add_initializer(graph, name, _as_bytes(tensor, shape))
    return views[zeros]


def _as_bytes(tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.TensorProtocol:
    """The same bytes as uint8 in another shape: still in the weights file, if they are there."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            ir.DataType.UINT8,
            shape=ir.Shape(shape),
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )

    def evaluate() -> ir.TensorProtocol:
        array: npt.NDArray[np.uint8] = np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape)
        return ir.tensor(array, name=tensor.name)

    return ir.LazyTensor(evaluate, dtype=ir.DataType.UINT8, shape=ir.Shape(shape), name=tensor.name, cache=False)


def _sizes(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    rows, columns = value.shape
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns
