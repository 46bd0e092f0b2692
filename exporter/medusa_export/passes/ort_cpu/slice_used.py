"""Slices the cache to the entries in use, so that attention does not cost its whole capacity."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS, PAST


class UsedEntries(GraphPass):
    """Slice what is cached, and the mask, to the longest sequence of the batch, including its new tokens.

    Needs: a step graph whose layers read the outputs of ``TensorScatter``, and whose mask takes the capacity from the shape of
    a cache input.
    Result: the same graph with ``max(cache_lengths) + T`` instead of the capacity, so a step costs only the entries in use.
    Entries in use are copied once per step. Those that are gathered by their numbers are not sliced.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        lengths, ids = inputs.get("cache_lengths"), inputs.get("input_ids")
        caches = [node.outputs[0] for node in graph if node.op_type == "TensorScatter" and _is_read_whole(node.outputs[0])]
        if lengths is None or ids is None:
            self.decline("a graph without cache_lengths and input_ids")
            return 0
        if not caches:
            self.decline("a graph whose layers read no cache in its order")
            return 0
        tape = ir.tape.Tape()
        tokens = tape.op("Shape", [ids], {"start": 1, "end": 2})  # [1]
        used = tape.op("Add", [tape.op("ReduceMax", [lengths], {"keepdims": 1}), tokens])  # [1]
        used.shape, used.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
        used.name = "used_entries"
        for node in [node for node in graph if _is_capacity(node)]:
            node.outputs[0].replace_all_uses_with(used)
        graph.insert_before(graph[0], tape.nodes)
        zero, axis = constant(graph, "used_start", [0]), constant(graph, "used_axis", [CAPACITY_AXIS])
        for cache in caches:
            readers = list(cache.uses())  # attention, masks that are made from what is cached, keys that are made of latents
            cut = ir.node("Slice", [cache, zero, used, axis])
            cut.outputs[0].shape = None if cache.shape is None else ir.Shape([*cache.shape[:2], "used", *cache.shape[3:]])
            cut.outputs[0].type = cache.type
            producer = cache.producer()
            assert producer is not None
            graph.insert_after(producer, cut)
            for reader, place in readers:
                reader.replace_input_with(place, cut.outputs[0])
        return len(caches)


def _is_read_whole(cache: ir.Value) -> bool:
    return any(reader.op_type != "GatherND" for reader, _ in cache.uses())


def _is_capacity(node: ir.Node) -> bool:
    """Whether a node reads only the capacity from a cache input's shape."""
    if node.op_type != "Shape" or node.inputs[0] is None or not (node.inputs[0].name or "").startswith(PAST):
        return False
    return node.attributes.get_int("start", 0) == CAPACITY_AXIS and node.attributes.get_int("end", 0) == CAPACITY_AXIS + 1
