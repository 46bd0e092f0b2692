"""Spells out attention in operators that WebGPU has."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.attention_math import SINK_ATTENTION, is_attention
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.masks import additive_mask
from medusa_export.passes.common.values import constant, heads_and_width, replace


class DeviceAttention(GraphPass):
    """Expand ``Attention`` into matrix products and a softmax which read keys and values where they lie.

    Needs: ``Attention`` or ``SinkAttention`` nodes with a mask [B, 1, T, S] or [B, Hq, T, S], boolean or additive, inputs of
    shape [B, H, T, D] with known H and D, no past, and no output but the first.
    Result: the product of keys [B, Hkv, S, D] with the turned queries [B, Hkv, D, G·T]. So the cache, which is the larger one,
    is not turned. The scores are turned, and the query heads of one key head stay together. A boolean mask becomes one of
    numbers, once for all layers.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        masks: dict[tuple[ir.Value, int, int], ir.Value] = {}
        count = 0
        for node in [node for node in model.graph if is_attention(node)]:
            if len(node.outputs) != 1 or len(node.inputs) < 4 or node.inputs[3] is None:
                self.decline("it has other inputs or outputs than queries, keys, values and a mask")
                continue
            _expand(model.graph, node, masks)
            count += 1
        return count


def _expand(graph: ir.Graph, attention: ir.Node, masks: dict[tuple[ir.Value, int, int], ir.Value]) -> None:
    query, key, value, mask = attention.inputs[:4]
    assert query is not None
    assert query.dtype is not None
    assert value is not None
    assert mask is not None
    (query_heads, width), (kv_heads, _), (_, value_width) = (heads_and_width(each) for each in (query, key, value))
    scale = attention.attributes.get_float("scale", width**-0.5)
    cap, tape, number = attention.attributes.get_float("softcap", 0.0), ir.tape.Tape(), query.dtype.numpy().type
    kind = query.dtype.name.lower()
    groups = query_heads // kv_heads
    if (mask, kv_heads, groups) not in masks:
        masks[mask, kv_heads, groups] = _grouped_mask(graph, tape, mask, query.dtype, kv_heads, groups)
    grouped = tape.op("Reshape", [query, constant(graph, f"grouped_{kv_heads}_{width}", [0, kv_heads, -1, width])])
    factor = scale / (cap or 1.0)
    scaled = tape.op("Mul", [grouped, constant(graph, f"scale_{factor}_{kind}", number(factor))])
    turned = tape.op("MatMul", [key, tape.op("Transpose", [scaled], {"perm": [0, 1, 3, 2]})])  # [B, Hkv, S, G·T]
    scores = tape.op("Transpose", [turned], {"perm": [0, 1, 3, 2]})
    if cap:
        scores = tape.op("Mul", [tape.op("Tanh", [scores]), constant(graph, f"cap_{cap}_{kind}", number(cap))])
    scores = tape.op("Add", [scores, masks[mask, kv_heads, groups]])
    attended = tape.op("MatMul", [tape.op("Softmax", [scores], {"axis": -1}), value])  # [B, Hkv, G·T, D]
    whole = constant(graph, f"by_head_{query_heads}_{value_width}", [0, query_heads, -1, value_width])
    result = tape.op("Reshape", [attended, whole])
    if attention.op_type == SINK_ATTENTION:
        result = tape.op("Mul", [result, _share(graph, tape, scores, attention.inputs[4], query_heads)])
    graph.insert_before(attention, tape.nodes)
    replace(attention.outputs[0], result)
    graph.remove(attention, safe=True)


def _share(graph: ir.Graph, tape: ir.tape.Tape, scores: ir.Value, sinks: ir.Value | None, query_heads: int) -> ir.Value:
    """The part of the softmax that is not the sinks': sigmoid(log sum exp(score) - sink). [B, Hq, T, 1]"""
    last = constant(graph, "last_axis", [-1])
    largest = tape.op("ReduceMax", [scores, last], {"keepdims": 1})
    total = tape.op("ReduceSum", [tape.op("Exp", [tape.op("Sub", [scores, largest])]), last], {"keepdims": 1})
    whole = tape.op("Add", [largest, tape.op("Log", [total])])  # [B, Hkv, G·T, 1]
    by_head = tape.op("Reshape", [whole, constant(graph, f"by_head_{query_heads}_1", [0, query_heads, -1, 1])])
    each = tape.op("Reshape", [sinks, constant(graph, f"sinks_{query_heads}", [1, query_heads, 1, 1])])
    return tape.op("Sigmoid", [tape.op("Sub", [by_head, each])])


def _grouped_mask(
    graph: ir.Graph, tape: ir.tape.Tape, mask: ir.Value, dtype: ir.DataType, kv_heads: int, groups: int
) -> ir.Value:
    """The mask as numbers to add to scores [B, Hkv, G·T, S]: [B, 1, G·T, S] if it is one for all heads."""
    if mask.dtype == ir.DataType.BOOL:
        mask = additive_mask(graph, tape, mask, dtype)
    assert mask.shape is not None
    if mask.shape[1] == 1:
        return mask if groups == 1 else tape.op("Concat", [mask] * groups, {"axis": 2})
    capacity = tape.op("Shape", [mask], {"start": 3, "end": 4})
    shape = tape.op("Concat", [constant(graph, f"grouped_mask_{kv_heads}", [0, kv_heads, -1]), capacity], {"axis": 0})
    return tape.op("Reshape", [mask, shape])
