"""The graph that edits a cache on a device which cannot do so by itself: it moves and copies entries."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.cache_inputs import cache_inputs
from medusa_export.passes.common.values import constant, heads_and_width
from medusa_export.passes.webgpu.scatter_entries import scatter_indices
from medusa_runtime.bundle.cache_layout import FROM, PAST, PRESENT, SOURCES, TARGETS


def cache_graph(step: ir.Model) -> ir.Model:
    """A graph for caches of a step graph's layout, see docs/onnx-contract.md.

    For each tensor, ``present.X`` is ``past.X`` with its entries at `targets` replaced by those of ``from.X`` at `sources`.
    All entries are read before one is written, so ``from.X`` may be ``past.X``, and ``present.X`` too.
    """
    pasts = cache_inputs(step.graph)
    int64 = ir.TensorType(ir.DataType.INT64)
    sources, targets = (ir.Value(name=name, shape=ir.Shape(["entries"]), type=int64) for name in (SOURCES, TARGETS))
    inputs, outputs, tape = [sources, targets], [], ir.tape.Tape()
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(step.graph.opset_imports), name="cache")
    indices: dict[int, ir.Value] = {}
    for value in pasts:
        assert value.shape is not None
        name, heads = (value.name or "").removeprefix(PAST), heads_and_width(value)[0]
        batch, _, capacity, width = value.shape
        past = ir.Value(name=PAST + name, shape=ir.Shape([batch, heads, capacity, width]), type=value.type)
        other = ir.Value(name=FROM + name, shape=ir.Shape([batch, heads, "from_capacity", width]), type=value.type)
        if heads not in indices:
            indices[heads] = _indices(graph, tape, targets, heads)
        gathered = tape.op("Gather", [other, sources], {"axis": 2})
        present = tape.op("ScatterND", [past, indices[heads], gathered])
        present.name, present.shape, present.type = PRESENT + name, past.shape, past.type
        inputs += [other, past]
        outputs.append(present)
    graph.inputs.extend(inputs)
    graph.extend(tape.nodes)
    graph.outputs.extend(outputs)
    return ir.Model(graph, ir_version=step.ir_version)


def _indices(graph: ir.Graph, tape: ir.tape.Tape, targets: ir.Value, heads: int) -> ir.Value:
    """The indices of entries in a cache of one sequence. [1, H, A, 3]"""
    sequence = constant(graph, "sequence", np.zeros((1, 1, 1, 1), np.int64))
    places = tape.op("Unsqueeze", [targets, constant(graph, "axes_0_1_3", [0, 1, 3])])
    return scatter_indices(graph, tape, sequence, places, heads)
