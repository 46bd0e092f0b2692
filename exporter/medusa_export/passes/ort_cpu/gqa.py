"""Fuses attention and the cache update into one operator per layer, for one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.attention_math import is_attention
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.masks import additive_mask
from medusa_export.passes.common.values import constant, heads_and_width, replace

WIDTH_MULTIPLE = 8  # the operator refuses heads of other sizes
SWAPPED = [0, 2, 1, 3]  # [B, T, H, D] to [B, H, T, D], and back


class CachedAttention(GraphPass):
    """Replace attention and the cache's operators by ``GroupQueryAttention``, for one sequence.

    Needs: a float32 step graph after `UsedEntries`, with layers of ``Attention(q, k, v, mask)``. k and v are slices of a cache
    into which ``TensorScatter`` wrote at ``cache_lengths``. Values are as wide as keys, and no other layer reads them. Heads
    whose size is a multiple of 8.
    Result: ONNX Runtime's contributed operator, with the mask as its bias. If past and present share their memory, it writes
    the new entries in place and copies nothing of the cache. It refuses several sequences with several tokens each. It also
    hides later tokens from earlier ones, as the mask already does.

    Its queries and keys are [B, T, H·D] and already rotated. `PackedAttention` moves the rotation into the operator.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        layers = []
        for node in [node for node in model.graph if is_attention(node)]:
            layer = _layer(node)
            if isinstance(layer, str):
                self.decline(layer)
            else:
                layers.append(layer)
        if layers:
            shared = _Shared(model.graph, layers[0].used)
            for layer in layers:
                _replace(model.graph, layer, shared)
            model.opset_imports["com.microsoft"] = 1
        return len(layers)


@dataclass(frozen=True)
class _Layer:
    """One layer's attention, and the nodes that write its cache."""

    attention: ir.Node
    cuts: tuple[ir.Node, ir.Node]  # Slice: the entries in use, of keys and of values
    key: ir.Node  # TensorScatter (past, new entries, cache_lengths)
    value: ir.Node

    @property
    def used(self) -> ir.Value:
        """The number of entries in use, including the new ones. [1]"""
        used = self.cuts[0].inputs[2]
        assert used is not None
        return used


def _layer(attention: ir.Node) -> _Layer | str:
    """A layer's attention with its cache; or why the operator cannot do it."""
    if (reason := _problem(attention)) is not None:
        return reason
    cuts = [_producer(value, "Slice") for value in attention.inputs[1:3]]
    key, value = (_producer(cut.inputs[0], "TensorScatter") if cut is not None else None for cut in cuts)
    if cuts[0] is None or cuts[1] is None or key is None or value is None:
        return "its keys and values are not those of the cache"
    if not all(_writes_behind_lengths(node) for node in (key, value)):
        return "its cache is not written at cache_lengths"
    if heads_and_width(key.outputs[0]) != heads_and_width(value.outputs[0]):
        return "its values have another size than its keys"
    if any(len(node.outputs[0].uses()) != 1 for node in (cuts[0], cuts[1], key, value)):
        return "another layer reads its keys and values"
    return _Layer(attention, (cuts[0], cuts[1]), key, value)


def _problem(attention: ir.Node) -> str | None:
    """What of the attention itself the operator cannot do; None if it can do it."""
    query, mask = attention.inputs[0], attention.inputs[3] if len(attention.inputs) in (4, 5) else None
    if query is None or mask is None or len(attention.outputs) != 1:
        return "it has other inputs or outputs than queries, keys, values and a mask"
    if query.dtype != ir.DataType.FLOAT:
        return f"it computes in {query.dtype}, not in float32"
    if mask.dtype != ir.DataType.BOOL or mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1:
        return "its mask is not boolean and one for all heads"
    if attention.attributes.get_int("is_causal", 0):
        return "it hides later tokens by itself"
    width = heads_and_width(query)[1]
    return (
        f"its heads have size {width}, and the operator takes multiples of {WIDTH_MULTIPLE}" if width % WIDTH_MULTIPLE else None
    )


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _writes_behind_lengths(node: ir.Node) -> bool:
    places = node.inputs[2] if len(node.inputs) == 3 else None
    return (
        node.attributes.get_int("axis", -2) == 2
        and node.attributes.get_string("mode", "linear") == "linear"
        and places is not None
        and places.is_graph_input()
        and places.name == "cache_lengths"
    )


class _Shared:
    """Values that all layers read. They are computed once per step."""

    def __init__(self, graph: ir.Graph, used: ir.Value) -> None:
        self._graph = graph
        self._biases: dict[ir.Value, ir.Value] = {}
        tape = ir.tape.Tape()
        count = tape.op("Cast", [used], {"to": ir.DataType.INT32})
        self.last = tape.op("Sub", [count, constant(graph, "one_int32", np.array([1], np.int32))])  # [1]
        self.total = tape.op("Squeeze", [count])  # []
        source = used.producer()
        assert source is not None
        graph.insert_after(source, tape.nodes)

    def bias(self, tape: ir.tape.Tape, mask: ir.Value) -> ir.Value:
        """The mask as numbers to add to the scores of all heads. [1, 1, T, S]"""
        if mask not in self._biases:
            self._biases[mask] = additive_mask(self._graph, tape, mask, ir.DataType.FLOAT)
        return self._biases[mask]


def _replace(graph: ir.Graph, layer: _Layer, shared: _Shared) -> None:
    query, mask = layer.attention.inputs[0], layer.attention.inputs[3]
    assert query is not None
    assert mask is not None
    (query_heads, width), (kv_heads, _) = heads_and_width(query), heads_and_width(layer.key.outputs[0])
    tape = ir.tape.Tape()
    new = [_side_by_side(graph, tape, value) for value in (query, layer.key.inputs[1], layer.value.inputs[1])]
    bias, past = shared.bias(tape, mask), (layer.key.inputs[0], layer.value.inputs[0])
    attended, key, value = tape.op_multi_out(
        "GroupQueryAttention",
        [*new, *past, shared.last, shared.total, None, None, None, bias, *layer.attention.inputs[4:]],
        {
            "num_heads": query_heads,
            "kv_num_heads": kv_heads,
            "scale": layer.attention.attributes.get_float("scale", width**-0.5),
            "softcap": layer.attention.attributes.get_float("softcap", 0.0),
        },
        domain="com.microsoft",
        num_outputs=3,
    )
    parted = tape.op("Reshape", [attended, constant(graph, f"parted_{query_heads}_{width}", [0, 0, query_heads, width])])
    result = tape.op("Transpose", [parted], {"perm": SWAPPED})
    graph.insert_before(layer.attention, tape.nodes)
    for node, new_value in ((layer.attention, result), (layer.key, key), (layer.value, value)):
        replace(node.outputs[0], new_value)
    for node in (layer.attention, *layer.cuts, layer.key, layer.value):
        graph.remove(node, safe=True)
    _skip_swaps(graph, result, attended, query_heads * width)


def _side_by_side(graph: ir.Graph, tape: ir.tape.Tape, value: ir.Value | None) -> ir.Value:
    """A value [B, H, T, D] as [B, T, H·D]. If it was made from such a value, that one is used, rotated if necessary."""
    heads, width = heads_and_width(value)
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == SWAPPED:
        assert node.inputs[0] is not None
        parted = node.inputs[0].producer()
        if parted is not None and parted.op_type == "Reshape" and parted.inputs[0] is not None:
            whole = parted.inputs[0]
            if whole.shape is not None and len(whole.shape) == 3 and whole.shape[2] == heads * width:
                return whole
    elif node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        attributes = {name: node.attributes.get_int(name, 0) for name in ("interleaved", "rotary_embedding_dim")}
        rotated = tape.op(
            "RotaryEmbedding", [_side_by_side(graph, tape, node.inputs[0]), *node.inputs[1:]], attributes | {"num_heads": heads}
        )
        rotated.shape, rotated.type = _whole_shape(value, heads * width), value.type
        return rotated
    swapped = tape.op("Transpose", [value], {"perm": SWAPPED})
    whole = tape.op("Reshape", [swapped, constant(graph, f"whole_{heads * width}", [0, 0, heads * width])])
    whole.shape, whole.type = _whole_shape(value, heads * width), value.type
    return whole


def _whole_shape(value: ir.Value, width: int) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([value.shape[0], value.shape[2], width])


def _skip_swaps(graph: ir.Graph, parted: ir.Value, whole: ir.Value, width: int) -> None:
    """Remove a Transpose and Reshape back to [B, T, H·D]: the operator's output already has that shape."""
    for node, _ in list(parted.uses()):
        if node.op_type != "Transpose" or list(node.attributes.get_ints("perm", [])) != SWAPPED:
            continue
        for reshape, _ in list(node.outputs[0].uses()):
            shape = reshape.outputs[0].shape
            if reshape.op_type == "Reshape" and shape is not None and len(shape) == 3 and shape[2] == width:
                replace(reshape.outputs[0], whole)
                graph.remove(reshape, safe=True)
