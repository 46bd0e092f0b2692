"""Fuses a residual addition and the norm after it into one operator."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import replace


class SkipNorm(GraphPass):
    """Replace ``RMSNormalization(a + b)`` by ``SkipSimplifiedLayerNormalization(a, b)``, which also returns the sum.

    Needs: a sum of two tensors of the same shape whose first reader is a norm over the last axis with float32 weights.
    Result: a contributed operator of ONNX Runtime.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        count = 0
        for node in [node for node in model.graph if node.op_type == "RMSNormalization"]:
            addition = _addition(node)
            if isinstance(addition, str):
                self.decline(addition)
                continue
            fused = ir.node(
                "SkipSimplifiedLayerNormalization",
                [*addition.inputs, node.inputs[1]],
                {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
                domain="com.microsoft",
                num_outputs=4,
            )
            normal, _, _, kept = fused.outputs
            fused.outputs[1].name = fused.outputs[2].name = ""
            model.graph.insert_after(addition, fused)
            replace(node.outputs[0], normal)
            replace(addition.outputs[0], kept)
            model.graph.remove([node, addition], safe=True)
            count += 1
        if count:
            model.opset_imports["com.microsoft"] = 1
        return count


def _addition(norm: ir.Node) -> ir.Node | str:
    """The residual addition before a norm; or why the two cannot be fused."""
    total, weight = norm.inputs[0], norm.inputs[1]
    addition = total.producer() if total is not None else None
    if addition is None or addition.op_type != "Add":
        return "there is no addition before the norm"
    shapes = [value.shape for value in addition.inputs if value is not None and not value.is_initializer()]
    if len(shapes) != 2 or shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 3:
        return "the sum is not one of two values of the same shape [B, T, C]"
    if not all(isinstance(size, int) or size.value is not None for size in shapes[0]):
        return "the sum has a size without a name, which may differ in its two parts"
    if weight is None or weight.dtype != ir.DataType.FLOAT or weight.shape is None or len(weight.shape) != 1:
        return "the norm's weights are not float32 [C]"
    return addition if norm.attributes.get_int("axis", -1) == -1 else "the norm is not over the last axis"
