"""Lets the heads read rows of what a step left on the device."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant

ROWS = "rows"


class ReadRows(GraphPass):
    """Have the heads' graph choose the rows that it reads, so that hidden states never leave the device.

    Needs: a heads graph with the input ``hidden`` [B, C].
    Result: ``hidden`` is [B, R, C], as a step returns it, and the new input ``rows`` [B] has the row of each sequence among
    all B·R rows.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        graph = model.graph
        found = next(((place, value) for place, value in enumerate(graph.inputs) if value.name == "hidden"), None)
        if found is None:
            self.decline("a graph without the input hidden")
            return 0
        place, chosen = found
        assert chosen.shape is not None
        batch, width = chosen.shape
        hidden = ir.Value(name="hidden", shape=ir.Shape([batch, "rows", width]), type=chosen.type)
        rows = ir.Value(name=ROWS, shape=ir.Shape([batch]), type=ir.TensorType(ir.DataType.INT64))
        tape = ir.tape.Tape()
        flat = tape.op("Reshape", [hidden, constant(graph, "all_rows", [-1, int(str(width))])])
        gathered = tape.op("Gather", [flat, rows], {"axis": 0})
        gathered.shape, gathered.type = chosen.shape, chosen.type
        chosen.replace_all_uses_with(gathered)
        graph.inputs[place] = hidden
        graph.inputs.insert(place + 1, rows)
        graph.insert_before(graph[0], tape.nodes)
        return 1
