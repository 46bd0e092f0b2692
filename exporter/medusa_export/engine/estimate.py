"""Estimates the memory and the file sizes of engines before they are built."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from medusa_export.passes.common.values import heads_and_width
from medusa_runtime.bundle.cache_layout import PAST, PRESENT, CacheLayout
from medusa_runtime.bundle.manifest import HEADS, STEP, GraphFacts, TensorFacts

# Bytes of a plan in addition to its weights, measured with TensorRT-RTX 1.7:
KERNEL_BYTES = {STEP: 4_000_000, HEADS: 400_000}
NODE_BYTES, ROUNDED_BYTES = 12_000, 90_000  # for each node, and for each quantised weight
ROOT_BYTES = 400_000  # if heads read the root
_ITEM_BYTES = {"float": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a graph's weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def plan_bytes(name: str, model: ir.Model) -> int:
    """Estimated bytes on disk of a graph's plan."""
    rounded = sum(node.op_type == "DequantizeLinear" for node in model.graph)
    looks_up = any(value.name == "root_ids" for value in model.graph.inputs)
    kernels = KERNEL_BYTES[name] + len(model.graph) * NODE_BYTES + rounded * ROUNDED_BYTES + looks_up * ROOT_BYTES
    return weight_bytes(model) + kernels


def cache_bytes(step: GraphFacts, sizes: Mapping[str, int]) -> int:
    """Bytes of the cache, which is updated in place."""
    return CacheLayout.of(step).entry_bytes * sizes["batch"] * sizes["capacity"]


def io_bytes(graph: GraphFacts, sizes: Mapping[str, int]) -> int:
    """Bytes of a graph's inputs and outputs, without the cache."""
    return sum(
        _bytes(tensor, sizes) for tensor in (*graph.inputs, *graph.outputs) if not tensor.name.startswith((PAST, PRESENT))
    )


def activation_bytes(model: ir.Model, sizes: Mapping[str, int], *, scores: bool) -> int:
    """Upper bound of activation memory: peak bytes of live intermediate tensors, if nothing is fused.

    Args:
        model: a portable graph. Each tensor is freed after its last reader.
        sizes: the sizes of the named dimensions.
        scores: whether attention stores its scores, as it does without a fused kernel: twice [B, Hq, T, S].
    """
    graph = model.graph
    live: dict[ir.Value, int] = {}
    nodes = list(graph)
    last_reader = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
    most = 0
    for index, node in enumerate(nodes):
        live |= {value: _value_bytes(value, sizes) for value in node.outputs if not value.is_graph_output()}
        kept = _score_bytes(node, sizes) if scores and node.op_type == "Attention" else 0
        most = max(most, sum(live.values()) + kept)
        for value in {*node.inputs, *node.outputs}:
            if value in live and last_reader.get(value, -1) <= index:
                del live[value]
    return most


def _score_bytes(attention: ir.Node, sizes: Mapping[str, int]) -> int:
    query, key = attention.inputs[:2]
    assert query is not None
    assert query.shape is not None
    assert query.dtype is not None
    assert key is not None
    assert key.shape is not None
    heads, _ = heads_and_width(query)
    batch, tokens, slots = (_size(size, sizes) for size in (query.shape[0], query.shape[2], key.shape[2]))
    return int(2 * batch * heads * tokens * slots * query.dtype.itemsize)


def _value_bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    if value.shape is None or value.dtype is None:  # only slices of a few numbers have no shape
        return 0
    return math.ceil(math.prod(_size(size, sizes) for size in value.shape) * value.dtype.itemsize)


def _bytes(tensor: TensorFacts, sizes: Mapping[str, int]) -> int:
    return math.prod(_size(size, sizes) for size in tensor.shape) * _ITEM_BYTES[tensor.dtype]


def _size(size: int | str | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    found = ir.SymbolicDim(str(size)).evaluate(sizes)  # a name, or an expression such as batch*num_tokens
    return found if isinstance(found, int) else max(sizes.values())  # one without a name may be as large as any
