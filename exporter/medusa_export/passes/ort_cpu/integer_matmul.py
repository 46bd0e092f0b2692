"""Integer matrix products: int8 weights times activations that are rounded to integers, each row on its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.terms import noted_terms
from medusa_export.passes.common.values import add_initializer, constant, replace
from medusa_export.passes.ort_cpu.merge_projections import is_int8_weight

LEVELS = 127
TINY = 1e-30  # so that a row of zeros is not divided by zero
SECOND = 1 / 254  # the second term's level over the first's: its codes cover half a level to either side
NORMS = {"RMSNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # index of the input with the gains


class IntegerProducts(GraphPass):
    """Compute matrix products with int8 weights in integers.

    Needs: ``MatMul(x, DequantizeLinear(int8 weight, one scale per column))`` in float32.
    Result: x rounded to uint8 with zero point 128 (int8 x int8 has no fast kernel), ``MatMulIntegerToFloat``, and a node that
    undoes the scaling of x.

    With one term, each row of x is first divided by its largest magnitude. With two terms, each row is divided by its root mean
    square, unless x comes from a norm, which has already done so. Then the magnitudes have an upper bound known in advance. x
    is rounded to two terms of 8 bits: the second is the rest that the first leaves. The products of both terms are added. The
    bound is far above usual magnitudes, but 16 bits are precise enough for that.

    In both cases a row's result depends only on that row, not on the other tokens of a step. `DynamicQuantizeLinear` would
    use one scale for all rows, and a draft token could change the logits of another.

    A weight that several products read gets a name for each of them, and its bytes are stored once: where int8 products
    saturate, ONNX Runtime turns int8 weights into uint8 (`session.x64quantprecision`), and can do so for one reader only.

    Args:
        activation_bits: 8 or 16, for one or two terms, where no number of terms is noted on the product.
    """

    def __init__(self, activation_bits: int = 16) -> None:
        super().__init__()
        self._terms = 1 if activation_bits == 8 else 2

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        rounding = _Rounding(model.graph)
        products = [node for node in model.graph if node.op_type == "MatMul" and multiplies_int8(node)]
        read: set[tuple[ir.Value, ...]] = set()
        for node in products:
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            source = weight.producer()
            assert source is not None
            tape = ir.tape.Tape()
            data, scales = source.inputs
            assert data is not None
            if _initializers(data) in read:
                data = _again(model.graph, tape, data, len(read))
            read.add(_initializers(data))
            result = rounding.of(tape, x, noted_terms(node) or self._terms).product(model.graph, tape, data, scales)
            model.graph.insert_before(node, tape.nodes)
            replace(node.outputs[0], result)
            model.graph.remove(node, safe=True)
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            source = None if weight is None else weight.producer()
            if weight is not None and weight.is_initializer():
                self.decline("a product with a float weight")
            elif source is not None and source.op_type == "DequantizeLinear":
                self.decline("a product with a weight that has more than one scale per column")
        if products:
            model.opset_imports["com.microsoft"] = 1
        return len(products)


@dataclass(frozen=True)
class _Rounded:
    """An activation's codes, and the facts that turn a product with the codes into a product with the activation."""

    codes: ir.Value  # [.., T, K], or twice as long for two terms
    level: ir.Value  # the value of one code step in the scaled activation
    factor: ir.Value | None  # [.., T, 1]: the scale of each row, to be undone; None if rows are not scaled
    undo: Literal["Mul", "Div"] = "Mul"  # the operator that undoes the scaling
    shape: ir.Value | None = None  # [.., T, -1]: the product's shape, if there are two terms

    def product(self, graph: ir.Graph, tape: ir.tape.Tape, data: ir.Value, scales: ir.Value | None) -> ir.Value:
        zero = constant(graph, "code_of_zero", np.uint8(128))
        result = tape.op("MatMulIntegerToFloat", [self.codes, data, self.level, scales, zero], domain="com.microsoft")
        if self.shape is not None:  # add the two terms by a MatMul with [1, 2]: one pass instead of three (Split, Mul, Add)
            flat = tape.op("Reshape", [result, constant(graph, "by_term", [2, -1])])
            total = tape.op("MatMul", [constant(graph, "weights_of_terms", np.array([[1, SECOND]], np.float32)), flat])
            result = tape.op("Reshape", [total, self.shape])
        if self.factor is not None:
            result = tape.op(self.undo, [result, self.factor])
        return result


class _Rounding:
    """The rounded activations, each rounded once, and the shapes of their products."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[tuple[ir.Value, int], _Rounded] = {}
        self._shapes: dict[tuple[object, ...], ir.Value] = {}

    def of(self, tape: ir.tape.Tape, x: ir.Value, terms: int) -> _Rounded:
        """The codes of an activation [.., K], in one term or two."""
        if (x, terms) not in self._rounded:
            if terms == 1:
                self._rounded[x, terms] = _round8(self._graph, tape, x)
            else:
                self._rounded[x, terms] = _round16(self._graph, tape, x, self._shape(tape, x))
        return self._rounded[x, terms]

    def _shape(self, tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        """The shape of a product with x, as a target of ``Reshape``: [.., -1]. Computed once per leading shape."""
        assert x.shape is not None  # x is multiplied with a weight, so its rank is known
        rows = tuple(size if isinstance(size, int) else size.value for size in x.shape[:-1])
        if rows not in self._shapes or None in rows:  # unknown sizes may differ
            leading = tape.op("Shape", [x], {"start": 0, "end": -1})
            self._shapes[rows] = tape.op("Concat", [leading, constant(self._graph, "last_axis", [-1])], {"axis": 0})
        return self._shapes[rows]


def _initializers(data: ir.Value) -> tuple[ir.Value, ...]:
    """The initializers that codes are computed from, or the one that they are."""
    source = data.producer()
    if source is None:
        return (data,)
    return tuple(each for value in source.inputs if value is not None for each in _initializers(value))


def _again(graph: ir.Graph, tape: ir.tape.Tape, data: ir.Value, number: int) -> ir.Value:
    """Codes of a weight under another name: an initializer, or what is computed from initializers, which get other names too.

    With the same initializers, ONNX Runtime would see that both are equal, and compute one of them.
    """
    source = data.producer()
    if source is None:
        assert data.const_value is not None
        return add_initializer(graph, f"{data.name}.again_{number}", data.const_value)
    inputs = [None if value is None else _again(graph, tape, value, number) for value in source.inputs]
    result = tape.op(source.op_type, inputs, dict(source.attributes))
    result.shape, result.type = data.shape, data.type
    return result


def multiplies_int8(node: ir.Node) -> bool:
    """Whether a ``MatMul`` has an int8 weight that `IntegerProducts` can take."""
    weight = node.inputs[1]
    source = None if weight is None else weight.producer()
    return source is not None and is_int8_weight(source)


def _round8(graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value) -> _Rounded:
    largest = tape.op("ReduceMax", [tape.op("Abs", [x]), constant(graph, "last_axis", [-1])], {"keepdims": 1})
    # In a row of zeros, 0 / 0 gives arbitrary codes, and their product is multiplied with 0 in the end.
    level = constant(graph, "level", 1 / LEVELS)
    codes = tape.op("QuantizeLinear", [tape.op("Div", [x, largest]), level, constant(graph, "code_of_zero", np.uint8(128))])
    return _Rounded(codes, level, largest)


def _round16(graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value, shape: ir.Value) -> _Rounded:
    zero = constant(graph, "code_of_zero", np.uint8(128))
    bound, factor = _bound_after_norm(x), None
    if bound is None:
        width = _width(x)
        bound = math.sqrt(width)
        x, factor = tape.op_multi_out(
            "SimplifiedLayerNormalization",
            [x, constant(graph, f"ones_{width}", np.ones(width, np.float32))],
            {"axis": -1, "epsilon": TINY},
            num_outputs=2,
        )
    level, second_level = (_level(graph, bound * part) for part in (1.0, SECOND))
    codes = tape.op("QuantizeLinear", [x, level, zero])
    left = tape.op("Sub", [x, tape.op("DequantizeLinear", [codes, level, zero])])
    codes = tape.op("Concat", [codes, tape.op("QuantizeLinear", [left, second_level, zero])], {"axis": 0})
    return _Rounded(codes, level, factor, "Div", shape)


def _bound_after_norm(x: ir.Value) -> float | None:
    """An upper bound for the magnitudes of x if it is a norm's output: N values of mean square 1 are at most √N each."""
    node = x.producer()
    if node is None or node.op_type not in NORMS or x is not node.outputs[0]:
        return None
    gain = node.inputs[NORMS[node.op_type]]
    if gain is None or gain.const_value is None:
        return None
    gains = np.abs(gain.const_value.numpy())
    return float(math.sqrt(gains.size) * max(gains.max(), TINY))


def _width(x: ir.Value) -> int:
    width = x.shape[-1] if x.shape is not None else None
    assert isinstance(width, int)  # x is multiplied with a weight of known size
    return width


def _level(graph: ir.Graph, bound: float) -> ir.Value:
    return constant(graph, f"level_{bound / LEVELS!r}", bound / LEVELS)
