"""Adds outputs to a float32 graph that describe the inputs of its linear layers, over all tokens of a step."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from medusa_export.passes.common.linears import linears
from medusa_export.passes.common.values import constant
from medusa_export.passes.ort_cpu.integer_matmul import LEVELS, TINY


def with_errors(model: ir.Model) -> dict[str, str]:
    """Add an output [] for each linear layer's input: the error of rounding it in one term of 8 bits.

    The error is the energy of what rounding changes, relative to the row's energy, on average over all rows.

    Returns:
        The outputs' names by the inputs' names.
    """
    graph = model.graph
    names: dict[str, str] = {}
    for x in _inputs(graph):
        tape = ir.tape.Tape()
        last, tiny, levels = constant(graph, "probe_axis", [-1]), constant(graph, "probe_tiny", TINY), float(LEVELS)
        largest = tape.op("Max", [tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1}), tiny])
        level = tape.op("Div", [largest, constant(graph, "probe_levels", levels)])
        rounded = tape.op("Mul", [tape.op("Round", [tape.op("Div", [x, level])]), level])
        error, energy = (
            tape.op("ReduceSumSquare", [value, last], {"keepdims": 0}) for value in (tape.op("Sub", [x, rounded]), x)
        )
        relative = tape.op("Div", [error, tape.op("Max", [energy, tiny])])
        mean = tape.op("ReduceMean", [relative], {"keepdims": 0})
        names[x.name or ""] = _output(graph, tape, mean, f"rounding_error.{len(names)}", [])
    return names


def with_moments(model: ir.Model, inputs: Collection[str]) -> dict[str, str]:
    """Add an output [K, K] for each of the named inputs of linear layers: the sum of x · xᵀ over all rows x [K].

    Returns:
        The outputs' names by the inputs' names.
    """
    graph = model.graph
    names: dict[str, str] = {}
    for x in _inputs(graph):
        if x.name not in inputs:
            continue
        assert x.shape is not None
        width = x.shape[-1]
        assert isinstance(width, int)  # it is multiplied with a weight
        tape = ir.tape.Tape()
        rows = tape.op("Reshape", [x, constant(graph, f"probe_rows_{width}", [-1, width])])
        moments = tape.op("MatMul", [tape.op("Transpose", [rows], {"perm": [1, 0]}), rows])
        names[x.name or ""] = _output(graph, tape, moments, f"moments.{len(names)}", [width, width])
    return names


def _inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs of the graph's linear layers, each once."""
    return [x for x in dict.fromkeys(linear.node.inputs[0] for linear in linears(graph)) if x is not None]


def _output(graph: ir.Graph, tape: ir.tape.Tape, value: ir.Value, name: str, shape: list[int]) -> str:
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph.extend(tape.nodes)
    graph.outputs.append(value)
    return name
