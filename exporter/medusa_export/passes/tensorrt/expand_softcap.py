"""Expands attention with soft-capped scores."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.values import heads_and_width


class ExpandSoftcap(ir.passes.InPlacePass):
    """Expand attention with soft-capped scores (Gemma 2), which TensorRT's own attention does not support.

    Needs: ``Attention`` nodes with an additive mask, inputs of shape [B, H, T, D] with known H and D, and no past.
    Result: no ``Attention`` with ``softcap``. Instead, matrix products and ``softmax(cap · tanh(q kᵀ · scale / cap) + mask)``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expand in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Attention" and "softcap" in node.attributes:
                _expand(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _expand(graph: ir.Graph, attention: ir.Node) -> None:
    query, key, value, mask = attention.inputs[:4]  # [B, Hq, T, D], [B, Hkv, S, D] twice, [B, 1, T, S]
    assert query is not None
    assert query.dtype is not None
    dtype, (query_heads, width), (kv_heads, _) = query.dtype, heads_and_width(query), heads_and_width(key)
    value_width = heads_and_width(value)[1]
    scale = attention.attributes["scale"].as_float() if "scale" in attention.attributes else width**-0.5
    cap = attention.attributes["softcap"].as_float()
    tape = ir.tape.Tape()

    def constant(data: float | list[int]) -> ir.Value:
        numbers = np.array(data, np.int64) if isinstance(data, list) else np.array(data, dtype.numpy())
        return tape.op("Constant", [], {"value": ir.tensor(numbers)})

    group_axis = constant([2])  # the query heads that share one key head
    by_group = constant([0, kv_heads, query_heads // kv_heads, -1, width])
    grouped = tape.op("Reshape", [query, by_group])  # [B, Hkv, G, T, D]
    scaled = tape.op("Mul", [grouped, constant(scale / cap)])
    keys = tape.op("Unsqueeze", [key, group_axis])  # [B, Hkv, 1, S, D]
    transposed = tape.op("Transpose", [keys], {"perm": [0, 1, 2, 4, 3]})  # [B, Hkv, 1, D, S]
    scores = tape.op("MatMul", [scaled, transposed])  # [B, Hkv, G, T, S]
    capped = tape.op("Mul", [tape.op("Tanh", [scores]), constant(cap)])
    masked = tape.op("Add", [capped, tape.op("Unsqueeze", [mask, group_axis])])
    weights = tape.op("Softmax", [masked], {"axis": -1})
    attended = tape.op("MatMul", [weights, tape.op("Unsqueeze", [value, group_axis])])  # [B, Hkv, G, T, D]
    result = tape.op("Reshape", [attended, constant([0, query_heads, -1, value_width])])  # [B, Hq, T, D]

    graph.insert_before(attention, tape.nodes)
    attention.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(attention, safe=True)
