"""Values that hold tensors."""

from __future__ import annotations

import onnx_ir as ir


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    """A tensor's shape, which is always known."""
    return ir.Shape([size for size in tensor.shape if isinstance(size, int)])


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor as the graph's initializer of that name."""
    value = ir.Value(name=name, shape=shape_of(tensor), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
