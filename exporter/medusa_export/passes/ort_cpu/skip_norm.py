"""Fuses a residual addition and the norm after it into one operator."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.values import replace


class SkipNorm(ir.passes.InPlacePass):
    """Replace ``RMSNormalization(a + b)`` by ``SkipSimplifiedLayerNormalization(a, b)``, which also returns the sum.

    Needs: a sum of two tensors of the same shape whose first reader is a norm over the last axis with float32 weights.
    Result: a contributed operator of ONNX Runtime.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in [node for node in model.graph if node.op_type == "RMSNormalization"]:
            total = node.inputs[0]
            assert total is not None
            addition = total.producer()
            if addition is None or addition.op_type != "Add" or not _is_residual(addition) or not _over_last_axis(node):
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
            replace(total, kept)
            model.graph.remove([node, addition], safe=True)
            modified = True
        if modified:
            model.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified)


def _is_residual(addition: ir.Node) -> bool:
    shapes = [value.shape for value in addition.inputs if value is not None and not value.is_initializer()]
    if len(shapes) != 2 or shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 3:
        return False
    return all(isinstance(size, int) or size.value is not None for size in shapes[0])  # unknown sizes may differ


def _over_last_axis(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return (
        node.attributes.get_int("axis", -1) == -1
        and weight is not None
        and weight.dtype == ir.DataType.FLOAT
        and weight.shape is not None
        and len(weight.shape) == 1
    )
