"""Makes one node of attention with sinks again, for the passes that have a better form of it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.common.attention_math import SINK_ATTENTION, SINK_DOMAIN
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.roles import parts
from medusa_export.passes.common.values import replace
from medusa_export.passes.portable.expand_sinks import ROLES, SINKS


class CollectSinks(GraphPass):
    """Undo `ExpandSinks`.

    Needs: a graph as `ExpandSinks` writes it.
    Result: ``SinkAttention`` nodes, which no backend knows. `CachedAttention` and `GroupedAttention` replace them.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        found = parts(model.graph, SINKS)
        for part in found:
            attributes: dict[str, float] = {name: part.facts[name] for name in ("scale", "softcap") if name in part.facts}
            inputs = [part.read(role) for role in ROLES]
            node = ir.node(SINK_ATTENTION, inputs, attributes, domain=SINK_DOMAIN)
            model.graph.insert_before(part.nodes["result"], node)
            replace(part.result, node.outputs[0])
        if found:
            RemoveUnusedNodesPass()(model)
        return len(found)
