"""The TensorRT step graph, derived from the portable one by passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.trt.softcap import ExpandSoftcap
from medusa_runtime.bundle.manifest import Precision

PAST_PREFIX = "past."
CAPACITY_AXIS = 2  # of a cache tensor: [B, Hkv, S, D]
HIDDEN = {ir.DataType.FLOAT: -1.7e38, ir.DataType.FLOAT16: -32752.0, ir.DataType.BFLOAT16: -1.7e38}  # lowest / 2


def specialize(model: ir.Model, precision: Precision, capacity: int) -> None:
    """Make a portable step graph one that TensorRT and TensorRT-RTX build, in place.

    It still computes the same, for caches of `capacity` slots.
    """
    StaticCapacity(capacity)(model)
    AdditiveMask()(model)
    ExpandSoftcap()(model)
    if precision == "fp32":
        DecomposableAttention()(model)


class StaticCapacity(ir.passes.InPlacePass):
    """Fix the cache's number of slots: TensorRT updates a cache in place only where that is static.

    Needs: ``past.*`` inputs of shape [B, Hkv, S, D] with one name for S. Leaves: S as a number there and wherever else
    a shape names it; batch, tokens and rows stay dynamic.

    Args:
        capacity: S, in slots.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        pasts = [value for value in model.graph.inputs if (value.name or "").startswith(PAST_PREFIX)]
        names = {value.shape[CAPACITY_AXIS] for value in pasts if value.shape is not None}
        modified = False
        for value in (*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)):
            if value.shape is not None and any(size in names for size in value.shape):
                value.shape = ir.Shape([self.capacity if size in names else size for size in value.shape])
                modified = True
        return ir.passes.PassResult(model, modified)


class AdditiveMask(ir.passes.InPlacePass):
    """Give attention what is added to its scores instead of a mask of booleans, made once for all layers.

    Needs: ``Attention`` nodes with a boolean mask. Leaves: the same attention under a mask in the dtype of its keys.
    TensorRT-RTX 1.7's compiler fails on the boolean one in 16-bit graphs ("more than one op named … iota").

    A hidden slot gets half the lowest number, so that no score makes the sum overflow: a kernel that reads the cache in
    blocks, one of which may be hidden altogether, would make NaN of a block of infinities.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        additive: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
            if mask is None or mask.dtype != ir.DataType.BOOL:
                continue
            if mask not in additive:
                additive[mask] = self._add(model.graph, node, mask)
            node.replace_input_with(3, additive[mask])
        return ir.passes.PassResult(model, modified=bool(additive))

    @staticmethod
    def _add(graph: ir.Graph, attention: ir.Node, mask: ir.Value) -> ir.Value:
        key = attention.inputs[1]
        assert key is not None
        assert key.dtype is not None
        seen = _constant(graph, f"{mask.name}_seen", 0.0, key.dtype)
        hidden = _constant(graph, f"{mask.name}_hidden", HIDDEN[key.dtype], key.dtype)
        where = ir.node("Where", [mask, seen, hidden], name=f"{mask.name}_additive")
        result = where.outputs[0]
        result.name, result.shape, result.type = f"{mask.name}_additive", mask.shape, ir.TensorType(key.dtype)
        graph.insert_before(attention, where)
        return result


class DecomposableAttention(ir.passes.InPlacePass):
    """Let TensorRT run attention as several kernels.

    Needs: nothing. Leaves: ``TRT_decomposable=1`` on every ``Attention`` node. TensorRT has no fused kernel in fp32 and
    refuses the node without; ONNX Runtime refuses it with.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Mark in place."""
        nodes = [node for node in model.graph.all_nodes() if node.op_type == "Attention"]
        for node in nodes:
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _constant(graph: ir.Graph, name: str, number: float, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.array(number, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
