"""Turns a bfloat16 graph into a float32 graph with the same weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import shape_of


class Upcast(GraphPass):
    """Turn every bfloat16 value into float32.

    Needs: nothing.
    Result: a graph that a runtime without bfloat16 kernels can run, to check the trace and the stored weights. It does not
    round between operators as the bfloat16 graph does.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        matched = 0
        values = {*model.graph.inputs, *model.graph.initializers.values()}
        for node in model.graph:
            values.update(node.outputs)
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            if node.op_type == "Constant" and (attribute := node.attributes.get("value")) is not None:
                node.attributes["value"] = ir.AttrTensor("value", _widen(attribute.as_tensor()))
        for value in values:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
                matched += 1
            if value.const_value is not None:
                value.const_value = _widen(value.const_value)
        return matched


def _widen(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.BFLOAT16:
        return tensor
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=shape_of(tensor),
        name=tensor.name,
        cache=False,
    )
