"""Replaces boolean attention masks by additive ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.attention_math import HIDDEN


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


def _constant(graph: ir.Graph, name: str, number: float, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.array(number, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
