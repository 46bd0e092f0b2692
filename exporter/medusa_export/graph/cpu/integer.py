"""Products of int8 weights with activations rounded to integers, no row's rounding depending on another row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from medusa_export.graph.cpu.projections import is_int8_weight
from medusa_export.graph.values import constant, replace

LEVELS = 127
TINY = 1e-30  # what keeps a row of zeros from being divided by zero
SECOND = 1 / 254  # of a level: the second term's codes reach half a level to either side
NORMS = {"RMSNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # which input the gains are


class IntegerProducts(ir.passes.InPlacePass):
    """Multiply in integers where a weight is stored in them.

    Needs: ``MatMul(x, DequantizeLinear(int8 weight, a scale a column))`` in float32. Leaves: x rounded to uint8 with zero
    point 128 (int8 x int8 has no fast kernel), ``MatMulIntegerToFloat``, and the scaling that undoes x's.

    With 8 bits, each row of x is divided by its largest magnitude first. With 16, each row is divided by its root mean
    square, unless x comes from a norm, which has done so: then no magnitude can pass a bound that is known in advance. It is
    rounded to two terms of 8 bits, the second for what the first leaves, and their products are added. The bound is far above
    what is usual, but of 16 bits some can be spared.

    Either way a row's result depends on this row alone, whatever other tokens a step holds. `DynamicQuantizeLinear` would
    take one scale for all of them, and a draft could change another's logits.

    Args:
        activation_bits: 8 or 16.
    """

    def __init__(self, activation_bits: int = 16) -> None:
        super().__init__()
        self._activation_bits = activation_bits

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        rounding = _Rounding(model.graph, self._activation_bits)
        products = [node for node in model.graph if node.op_type == "MatMul" and _multiplies_int8(node)]
        for node in products:
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            source = weight.producer()
            assert source is not None
            tape = ir.tape.Tape()
            result = rounding.of(tape, x).product(model.graph, tape, source)
            model.graph.insert_before(node, tape.nodes)
            replace(node.outputs[0], result)
            model.graph.remove(node, safe=True)
        if products:
            model.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified=bool(products))


@dataclass(frozen=True)
class _Rounded:
    """An activation's codes, and how a product with them becomes one with the activation."""

    codes: ir.Value  # [.., T, K], or twice as long for two terms
    level: ir.Value  # what one step of the codes is worth, in the scaled activation
    factor: ir.Value | None  # [.., T, 1]: what undoes the scaling of each row, if there was one
    undo: Literal["Mul", "Div"] = "Mul"  # with the factor
    shape: ir.Value | None = None  # [.., T, -1], for two terms

    def product(self, graph: ir.Graph, tape: ir.tape.Tape, weight: ir.Node) -> ir.Value:
        data, scales = weight.inputs
        zero = constant(graph, "code_of_zero", np.uint8(128))
        result = tape.op("MatMulIntegerToFloat", [self.codes, data, self.level, scales, zero], domain="com.microsoft")
        if self.shape is not None:  # their sum as a product with [1, 2]: one pass over both, where Split, Mul and Add are three
            flat = tape.op("Reshape", [result, constant(graph, "by_term", [2, -1])])
            total = tape.op("MatMul", [constant(graph, "weights_of_terms", np.array([[1, SECOND]], np.float32)), flat])
            result = tape.op("Reshape", [total, self.shape])
        if self.factor is not None:
            result = tape.op(self.undo, [result, self.factor])
        return result


class _Rounding:
    """The activations that are rounded, each once, and the shapes of what they are multiplied to."""

    def __init__(self, graph: ir.Graph, bits: int) -> None:
        self._graph, self._bits = graph, bits
        self._rounded: dict[ir.Value, _Rounded] = {}
        self._shapes: dict[tuple[object, ...], ir.Value] = {}

    def of(self, tape: ir.tape.Tape, x: ir.Value) -> _Rounded:
        """The codes of an activation [.., K]."""
        if x not in self._rounded:
            if self._bits == 8:
                self._rounded[x] = _round8(self._graph, tape, x)
            else:
                self._rounded[x] = _round16(self._graph, tape, x, self._shape(tape, x))
        return self._rounded[x]

    def _shape(self, tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
        """What x is multiplied to, as ``Reshape`` takes it: [.., -1]. Made once for all that have as many rows."""
        assert x.shape is not None  # it is multiplied with a weight
        rows = tuple(size if isinstance(size, int) else size.value for size in x.shape[:-1])
        if rows not in self._shapes or None in rows:  # unknown sizes may differ
            leading = tape.op("Shape", [x], {"start": 0, "end": -1})
            self._shapes[rows] = tape.op("Concat", [leading, constant(self._graph, "last_axis", [-1])], {"axis": 0})
        return self._shapes[rows]


def _multiplies_int8(node: ir.Node) -> bool:
    weight = node.inputs[1]
    source = None if weight is None else weight.producer()
    return source is not None and is_int8_weight(source)


def _round8(graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value) -> _Rounded:
    largest = tape.op("ReduceMax", [tape.op("Abs", [x]), constant(graph, "last_axis", [-1])], {"keepdims": 1})
    largest = tape.op("Max", [largest, constant(graph, "tiny", TINY)])
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
    """What no magnitude of x can pass where it is a norm's output: with N values of mean square 1, each is at most √N."""
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
    assert isinstance(width, int)  # it is multiplied with a weight, whose size is known
    return width


def _level(graph: ir.Graph, bound: float) -> ir.Value:
    return constant(graph, f"level_{bound / LEVELS!r}", bound / LEVELS)
