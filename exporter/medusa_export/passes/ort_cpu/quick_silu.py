"""Fuses SiLU into one operator."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import replace


class QuickSilu(GraphPass):
    """Replace ``x · sigmoid(x)`` by ``QuickGelu`` with alpha 1, which passes over its input only once.

    Needs: float32 ``Mul(x, Sigmoid(x))`` whose sigmoid has no other reader.
    Result: a contributed operator of ONNX Runtime.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        count = 0
        for node in [node for node in model.graph if node.op_type == "Sigmoid"]:
            x, gate = node.inputs[0], node.outputs[0]
            uses = [usage.node for usage in gate.uses()]
            if len(uses) != 1 or uses[0].op_type != "Mul" or x not in uses[0].inputs or gate.is_graph_output():
                self.decline("the sigmoid's only reader is not a product with its input")
                continue
            [product] = uses
            fused = ir.node("QuickGelu", [x], {"alpha": 1.0}, domain="com.microsoft")
            model.graph.insert_before(product, fused)
            replace(product.outputs[0], fused.outputs[0])
            model.graph.remove([product, node], safe=True)
            count += 1
        if count:
            model.opset_imports["com.microsoft"] = 1
        return count
