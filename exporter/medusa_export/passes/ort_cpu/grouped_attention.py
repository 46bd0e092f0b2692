"""Expands attention into two matrix products and a softmax, with the query heads of one key head together."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.attention_math import SINK_ATTENTION, is_attention
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.masks import additive_mask
from medusa_export.passes.common.values import constant, heads_and_width, replace


class GroupedAttention(GraphPass):
    """Expand ``Attention`` so that keys and values are read only once for all query heads that share them.

    Needs: float32 ``Attention`` nodes with a boolean mask [B, 1, T, S], inputs of shape [B, H, T, D] with known H and D, no
    past, and no output but the first.
    Result: a MatMul of queries [B, Hkv, G·T, D] with the keys, a softmax, and a MatMul with the values. ONNX Runtime's kernel
    for the standard operator reads the keys once per query head instead.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        biases: dict[tuple[ir.Value, int], ir.Value] = {}
        count = 0
        for node in [node for node in model.graph if is_attention(node)]:
            if (reason := _problem(node)) is not None:
                self.decline(reason)
                continue
            _expand(model.graph, node, biases)
            count += 1
        if count:
            model.opset_imports["com.microsoft"] = 1
        return count


def _problem(node: ir.Node) -> str | None:
    """Why a node cannot be expanded; None if it can."""
    query, key, mask = node.inputs[0], node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
    most = 5 if node.op_type == SINK_ATTENTION else 4
    if query is None or key is None or mask is None or len(node.inputs) > most or len(node.outputs) != 1:
        return "it has other inputs or outputs than queries, keys, values and a mask"
    known = all(
        value.shape is not None and len(value.shape) == 4 and all(isinstance(value.shape[axis], int) for axis in (1, 3))
        for value in (query, key)
    )
    if not known:
        return "the number or the size of its heads is unknown"
    if query.dtype != ir.DataType.FLOAT:
        return f"it computes in {query.dtype}, not in float32"
    if mask.dtype != ir.DataType.BOOL or mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1:
        return "its mask is not boolean and one for all heads"
    return "it hides later tokens by itself" if node.attributes.get_int("is_causal", 0) else None


def _expand(graph: ir.Graph, attention: ir.Node, biases: dict[tuple[ir.Value, int], ir.Value]) -> None:
    query, key, value, mask = attention.inputs[:4]  # [B, Hq, T, D], [B, Hkv, S, D] twice, [B, 1, T, S]
    assert query is not None
    assert key is not None
    assert mask is not None
    (query_heads, width), (kv_heads, _) = heads_and_width(query), heads_and_width(key)
    value_width = heads_and_width(value)[1] if value is not None else width
    groups = query_heads // kv_heads
    scale = attention.attributes.get_float("scale", width**-0.5)
    cap = attention.attributes.get_float("softcap", 0.0)
    tape = ir.tape.Tape()
    if (mask, groups) not in biases:
        biases[mask, groups] = _bias(graph, tape, mask, groups)
    grouped = tape.op("Reshape", [query, constant(graph, f"grouped_{kv_heads}_{width}", [0, kv_heads, -1, width])])
    scores = tape.op(  # [B, Hkv, G·T, S]
        "FusedMatMul", [grouped, key], {"transB": 1, "alpha": scale / (cap or 1.0)}, domain="com.microsoft"
    )
    if cap:
        scores = tape.op("Mul", [tape.op("Tanh", [scores]), constant(graph, f"cap_{cap}", cap)])
    masked = tape.op("Add", [scores, biases[mask, groups]])
    weights = tape.op("Softmax", [masked], {"axis": -1})
    attended = tape.op("MatMul", [weights, value])  # [B, Hkv, G·T, D]
    by_head = constant(graph, f"by_head_{query_heads}_{value_width}", [0, query_heads, -1, value_width])
    result = tape.op("Reshape", [attended, by_head])  # [B, Hq, T, D]
    if attention.op_type == SINK_ATTENTION:
        column = constant(graph, f"by_head_{query_heads}_1", [0, query_heads, -1, 1])
        sinks = tape.op("Reshape", [attention.inputs[4], constant(graph, f"sinks_{query_heads}", [1, query_heads, 1, 1])])
        result = tape.op("Mul", [result, _share(graph, tape, masked, column, sinks)])
    graph.insert_before(attention, tape.nodes)
    replace(attention.outputs[0], result)
    graph.remove(attention, safe=True)


def _share(graph: ir.Graph, tape: ir.tape.Tape, scores: ir.Value, column: ir.Value, sinks: ir.Value) -> ir.Value:
    """The part of the softmax that is not the sinks': sigmoid(log sum exp(score) - sink). [B, Hq, T, 1]"""
    total = tape.op("ReduceLogSumExp", [scores, constant(graph, "last_axis", [-1])], {"keepdims": 1})
    return tape.op("Sigmoid", [tape.op("Sub", [tape.op("Reshape", [total, column]), sinks])])


def _bias(graph: ir.Graph, tape: ir.tape.Tape, mask: ir.Value, groups: int) -> ir.Value:
    """The mask as numbers to add to the scores, repeated for each query head of a group. [B, 1, G·T, S]"""
    bias = additive_mask(graph, tape, mask, ir.DataType.FLOAT)
    return bias if groups == 1 else tape.op("Concat", [bias] * groups, {"axis": 2})
