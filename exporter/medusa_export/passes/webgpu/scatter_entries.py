"""Writes new entries to the cache by an operator that WebGPU has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant, heads_and_width
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS


class ScatterEntries(GraphPass):
    """Replace ``TensorScatter`` by ``ScatterND``, which WebGPU runs in place if input and output are one buffer.

    Needs: ``TensorScatter(past, new, cache_lengths)`` along the capacity, with past [B, H, S, D] and known H and D.
    Result: ``ScatterND`` with indices [B, H, T, 3], which are made once for all tensors with as many heads.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        indices: dict[tuple[ir.Value, int], ir.Value] = {}
        nodes = [node for node in model.graph if node.op_type == "TensorScatter"]
        for node in nodes:
            past, new, lengths = node.inputs[:3]
            assert past is not None
            assert new is not None
            assert lengths is not None
            heads = heads_and_width(past)[0]
            tape = ir.tape.Tape()
            if (lengths, heads) not in indices:
                indices[lengths, heads] = entry_indices(model.graph, tape, lengths, new, heads)
            scatter = ir.node("ScatterND", [past, indices[lengths, heads], new])
            model.graph.insert_before(node, [*tape.nodes, scatter])
            present = node.outputs[0]
            scatter.outputs[0].shape, scatter.outputs[0].type = present.shape, present.type
            name = present.name
            present.replace_all_uses_with(scatter.outputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            scatter.outputs[0].name = name
        return len(nodes)


def entry_indices(graph: ir.Graph, tape: ir.tape.Tape, lengths: ir.Value, new: ir.Value, heads: int) -> ir.Value:
    """The place of each new entry: sequence, head, and entry after the sequence's length. [B, H, T, 3]

    Args:
        graph: the graph, for constants.
        tape: records the nodes.
        lengths: entries of each sequence before the step. [B]
        new: the new entries. [B, H, T, D]
        heads: H.
    """
    op, zero, one = tape.op, constant(graph, "first", np.int64(0)), constant(graph, "step", np.int64(1))
    count, tokens = op("Shape", [lengths]), op("Shape", [new], {"start": CAPACITY_AXIS, "end": CAPACITY_AXIS + 1})
    sequences = op("Range", [zero, op("Squeeze", [count]), one])
    places = op(  # [B, T]
        "Add",
        [
            op("Unsqueeze", [lengths, constant(graph, "axis_1", [1])]),
            op("Range", [zero, op("Squeeze", [tokens]), one]),
        ],
    )
    sequences = op("Unsqueeze", [sequences, constant(graph, "axes_1_2_3", [1, 2, 3])])
    return scatter_indices(graph, tape, sequences, op("Unsqueeze", [places, constant(graph, "axes_1_3", [1, 3])]), heads)


def scatter_indices(graph: ir.Graph, tape: ir.tape.Tape, sequences: ir.Value, places: ir.Value, heads: int) -> ir.Value:
    """The indices of entries in a cache [B, H, S, D], for ``ScatterND``: sequence, head, place. [B, H, T, 3]

    Args:
        graph: the graph, for constants.
        tape: records the nodes.
        sequences: [B, 1, 1, 1].
        places: [B, 1, T, 1].
        heads: H.
    """
    each = constant(graph, f"each_of_{heads}_heads", np.arange(heads).reshape(1, heads, 1, 1))
    whole = tape.op("Shape", [tape.op("Add", [places, each])])
    return tape.op("Concat", [tape.op("Expand", [part, whole]) for part in (sequences, each, places)], {"axis": 3})
