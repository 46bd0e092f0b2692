"""Expands attention with soft-capped scores."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.attention_math import spell_out
from medusa_export.passes.common.graph_pass import GraphPass


class ExpandSoftcap(GraphPass):
    """Expand attention with soft-capped scores (Gemma 2), which TensorRT's own attention does not support.

    Needs: ``Attention`` nodes with an additive mask, inputs of shape [B, H, T, D] with known H and D, and no past.
    Result: no ``Attention`` with ``softcap``. Instead, matrix products and ``softmax(cap · tanh(q kᵀ · scale / cap) + mask)``.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Expand in place."""
        matched = 0
        for node in list(model.graph):
            if node.op_type == "Attention" and "softcap" in node.attributes:
                nodes, result = spell_out(node)
                model.graph.insert_before(node, nodes)
                node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
                model.graph.remove(node, safe=True)
                matched += 1
        return matched
