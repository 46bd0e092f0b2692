"""Attention spelled out in matrix products and a softmax, with the query heads of one key head together."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.masks import HIDDEN
from medusa_export.passes.common.values import heads_and_width

SINK_DOMAIN, SINK_ATTENTION = "medusa.attention", "SinkAttention"  # Attention with a fifth input: the sinks [Hq]


def is_attention(node: ir.Node) -> bool:
    """Whether a node is an ``Attention``, with sinks or without."""
    return node.op_type in ("Attention", SINK_ATTENTION)


def spell_out(attention: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that compute an ``Attention`` or ``SinkAttention``, in order, and their result. [B, Hq, T, D]

    Needs: inputs of shape [B, H, T, D] with known H and D, a mask [B, 1, T, S] or [B, Hq, T, S], boolean or additive, no past.
    """
    query, key, value, mask = attention.inputs[:4]
    assert query is not None
    assert key is not None
    assert mask is not None
    assert mask.shape is not None
    assert query.dtype is not None
    dtype, (query_heads, width), (kv_heads, _) = query.dtype, heads_and_width(query), heads_and_width(key)
    groups, tape = query_heads // kv_heads, ir.tape.Tape()
    scale = attention.attributes.get_float("scale", width**-0.5)
    cap = attention.attributes.get_float("softcap", 0.0)

    def constant(data: float | list[int]) -> ir.Value:
        numbers = np.array(data, np.int64) if isinstance(data, list) else np.array(data, dtype.numpy())
        return tape.op("Constant", [], {"value": ir.tensor(numbers, dtype=None if isinstance(data, list) else dtype)})

    group_axis = constant([2])  # the query heads that share one key head
    grouped = tape.op("Reshape", [query, constant([0, kv_heads, groups, -1, width])])  # [B, Hkv, G, T, D]
    scaled = tape.op("Mul", [grouped, constant(scale / (cap or 1.0))])
    keys = tape.op("Unsqueeze", [key, group_axis])  # [B, Hkv, 1, S, D]
    scores = tape.op("MatMul", [scaled, tape.op("Transpose", [keys], {"perm": [0, 1, 2, 4, 3]})])  # [B, Hkv, G, T, S]
    if cap:
        scores = tape.op("Mul", [tape.op("Tanh", [scores]), constant(cap)])
    if mask.shape[1] == 1:
        grouped_mask = tape.op("Unsqueeze", [mask, group_axis])  # [B, 1, 1, T, S]
    else:
        sizes = tape.op("Shape", [mask], {"start": 2})
        by_group = tape.op("Concat", [constant([0, kv_heads, groups]), sizes], {"axis": 0})
        grouped_mask = tape.op("Reshape", [mask, by_group])
    if mask.dtype == ir.DataType.BOOL:
        scores = tape.op("Where", [grouped_mask, scores, constant(HIDDEN[dtype])])
    else:
        scores = tape.op("Add", [scores, grouped_mask])
    if key.shape is not None and query.shape is not None:
        scores.shape = ir.Shape([query.shape[0], kv_heads, groups, query.shape[2], key.shape[2]])
        scores.type = ir.TensorType(dtype)
    attended = tape.op("MatMul", [tape.op("Softmax", [scores], {"axis": -1}), tape.op("Unsqueeze", [value, group_axis])])
    if attention.op_type == SINK_ATTENTION:
        sinks = tape.op("Reshape", [attention.inputs[4], constant([1, kv_heads, groups, 1, 1])])
        attended = tape.op("Mul", [attended, share_without_sinks(tape, scores, sinks, constant([-1]))])
    assert value is not None
    whole = constant([0, query_heads, -1, heads_and_width(value)[1]])
    result = tape.op("Reshape", [attended, whole])
    return list(tape.nodes), result


def share_without_sinks(tape: ir.tape.Tape, scores: ir.Value, sinks: ir.Value, last_axis: ir.Value) -> ir.Value:
    """The part of the softmax that is not the sinks': Z / (Z + exp(sink - max)), Z = sum exp(score - max). [.., T, 1]

    A sink is one more score, of a value of zeros. So attention with sinks is attention without them, times this.
    """
    largest = tape.op("ReduceMax", [scores, last_axis], {"keepdims": 1})
    total = tape.op("ReduceSum", [tape.op("Exp", [tape.op("Sub", [scores, largest])]), last_axis], {"keepdims": 1})
    beside = tape.op("Exp", [tape.op("Sub", [sinks, largest])])
    return tape.op("Div", [total, tape.op("Add", [total, beside])])
