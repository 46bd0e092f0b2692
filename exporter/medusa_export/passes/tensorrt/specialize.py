"""Passes that derive TensorRT's step graph from the portable one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.attention_math import HIDDEN
from medusa_export.passes.tensorrt.expand_softcap import ExpandSoftcap
from medusa_runtime.bundle.manifest import Precision

PAST_PREFIX = "past."
CAPACITY_AXIS = 2  # of a cache tensor: [B, Hkv, S, D]


def specialize(model: ir.Model, precision: Precision, capacity: int) -> None:
    """Edit a portable step graph so that TensorRT and TensorRT-RTX can build it, in place.

    The results are the same, for caches of `capacity` entries per slot.
    """
    StaticCapacity(capacity)(model)
    AdditiveMask()(model)
    ExpandSoftcap()(model)
    if precision == "fp32":
        DecomposableAttention()(model)


class StaticCapacity(ir.passes.InPlacePass):
    """Make the cache's capacity static: TensorRT can update a cache in place only then.

    Needs: ``past.*`` inputs of shape [B, Hkv, S, D] with one name for S.
    Result: S is a number, in these and in all other shapes. Batch, tokens and rows stay dynamic.

    Args:
        capacity: S, the entries per slot.
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
    """Replace the boolean mask of attention by numbers to add to the scores, computed once for all layers.

    Needs: ``Attention`` nodes with a boolean mask.
    Result: the same attention, with an additive mask in the dtype of its keys. The compiler of TensorRT-RTX 1.7 fails on
    boolean masks in 16-bit graphs ("more than one op named … iota").

    A hidden entry gets half the lowest number, so that adding a score cannot overflow. -inf would not work: a kernel that reads
    the cache in blocks makes NaN of a block in which all entries are hidden.
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

    Needs: nothing.
    Result: ``TRT_decomposable=1`` on every ``Attention`` node. TensorRT has no fused kernel in fp32 and refuses the node
    without this attribute. ONNX Runtime refuses it with the attribute.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set the attribute in place."""
        nodes = [node for node in model.graph.all_nodes() if node.op_type == "Attention"]
        for node in nodes:
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _constant(graph: ir.Graph, name: str, number: float, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.array(number, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
