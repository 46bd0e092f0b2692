"""Passes that derive TensorRT's step graph from the portable one."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.tensorrt.additive_mask import AdditiveMask
from medusa_export.passes.tensorrt.expand_softcap import ExpandSoftcap
from medusa_export.passes.tensorrt.pad_heads import PadHeads
from medusa_export.passes.tensorrt.static_capacity import StaticCapacity
from medusa_runtime.bundle.manifest import Precision


def specialize(model: ir.Model, precision: Precision, capacity: int) -> None:
    """Edit a portable step graph so that TensorRT and TensorRT-RTX can build it, in place.

    The results are the same, for caches of `capacity` entries per slot.
    """
    StaticCapacity(capacity)(model)
    AdditiveMask()(model)
    ExpandSoftcap()(model)
    PadHeads()(model)
    if precision == "fp32":
        DecomposableAttention()(model)


class DecomposableAttention(GraphPass):
    """Let TensorRT run attention as several kernels.

    Needs: nothing.
    Result: ``TRT_decomposable=1`` on every ``Attention`` node. TensorRT has no fused kernel in fp32 and refuses the node
    without this attribute. ONNX Runtime refuses it with the attribute.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Set the attribute in place."""
        nodes = [node for node in model.graph.all_nodes() if node.op_type == "Attention"]
        for node in nodes:
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
        return len(nodes)
