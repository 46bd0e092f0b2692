"""Spells out attention with sinks in standard operators."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.attention_math import SINK_ATTENTION, SINK_DOMAIN, spell_out
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.roles import note_role
from medusa_export.passes.common.values import replace

SINKS = "sink attention"  # the kind of part that the nodes are noted as
ROLES = ("query", "key", "value", "mask", "sinks")  # of the nodes that read the operator's inputs, in their order


class ExpandSinks(GraphPass):
    """Spell out ``SinkAttention(query, key, value, mask, sinks)``.

    Needs: inputs of shape [B, H, T, D] with known H and D.
    Result: matrix products and a softmax, times the part of the softmax that is not the sinks'. The nodes' roles are noted, so
    that `CollectSinks` finds them.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Expand in place."""
        graph = model.graph
        found = [node for node in graph if node.op_type == SINK_ATTENTION]
        for number, node in enumerate(found):
            nodes, result = spell_out(node)
            for role, value in zip(ROLES, node.inputs, strict=True):
                reader = next(each for each in nodes if each.inputs and each.inputs[0] is value)
                note_role(reader, SINKS, number, role)
            facts = {name: attribute.value for name, attribute in node.attributes.items()}
            note_role(nodes[-1], SINKS, number, "result", **facts)
            graph.insert_before(node, nodes)
            replace(node.outputs[0], result)
            graph.remove(node, safe=True)
        model.opset_imports.pop(SINK_DOMAIN, None)
        return len(found)
