"""Computes attention once for values that share queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant, heads_and_width, replace


class MergeAttention(GraphPass):
    """Merge attention of the same queries to the same keys, with several values (differential attention: DiffLlama).

    Needs: ``Attention`` nodes with equal inputs except for the values, [B, H, T, D] with known H and D, equal attributes, and
    one output.
    Result: one ``Attention`` whose values lie side by side, and a ``Split``. Scores are computed once. TensorRT-RTX 1.7 crashes
    on two nodes which share their scores.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        groups: dict[object, list[ir.Node]] = {}
        for node in model.graph:
            if node.op_type == "Attention" and len(node.outputs) == 1:
                attributes = tuple(sorted((name, attribute.value) for name, attribute in node.attributes.items()))
                groups.setdefault((*node.inputs[:2], *node.inputs[3:], attributes), []).append(node)
        merged = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in merged:
            _merge(model.graph, nodes)
        return sum(len(nodes) for nodes in merged)


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Put one node in the place of the last, which all values come before. The graph must be sorted anew after it."""
    last, values = nodes[-1], [node.inputs[2] for node in nodes]
    widths = [heads_and_width(value)[1] for value in values]
    first = values[0]
    assert first is not None
    assert first.shape is not None
    tape = ir.tape.Tape()
    side_by_side = tape.op("Concat", values, {"axis": 3})
    side_by_side.shape, side_by_side.type = ir.Shape([*first.shape[:3], sum(widths)]), first.type
    inputs = [*last.inputs[:2], side_by_side, *last.inputs[3:]]
    attended = tape.op("Attention", inputs, {name: attribute.value for name, attribute in last.attributes.items()})
    result = nodes[0].outputs[0]
    attended.type = result.type
    attended.shape = None if result.shape is None else ir.Shape([*result.shape[:3], sum(widths)])
    sizes = constant(graph, "split_" + "_".join(map(str, widths)), widths)
    split = ir.node("Split", [attended, sizes], {"axis": 3}, num_outputs=len(nodes))
    graph.insert_before(last, [*tape.nodes, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        replace(node.outputs[0], part)
        graph.remove(node, safe=True)
