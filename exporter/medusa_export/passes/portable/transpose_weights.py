"""Stores weights in the layout that MatMul reads."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import add_initializer, shape_of, transposed


class TransposeWeights(GraphPass):
    """Store a linear layer's weight as [in, out] instead of transposing it when the graph is loaded.

    Needs: ``MatMul(x, Transpose(weight))``, which a trace of ``nn.Linear`` contains.
    Result: ``MatMul(x, weight)`` with the transposed weight, which is computed only when it is written. A weight that is also
    read in its own layout (a tied embedding) is not changed, so that it is stored once.

    Args:
        left_alone: names of weights that another graph of the bundle reads in their own layout; they are not changed.
    """

    def __init__(self, left_alone: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.left_alone = left_alone

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        matched = 0
        for name, weight in list(model.graph.initializers.items()):
            uses = [usage.node for usage in weight.uses()]
            if weight.const_value is None or not any(_is_plain_transpose(node) for node in uses):
                continue
            if name in self.left_alone:
                self.decline("a weight that another graph reads in its own layout")
                continue
            if not all(_is_plain_transpose(node) for node in uses):
                self.decline("a weight that is also read in its own layout")
                continue
            del model.graph.initializers[name]
            value = add_initializer(model.graph, name, _transposed(name, weight.const_value))
            for node in uses:
                node.outputs[0].replace_all_uses_with(value)
                model.graph.remove(node, safe=True)
            matched += 1
        return matched


def _is_plain_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.attributes.get_ints("perm", ()) == (1, 0)


def _transposed(name: str, tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(transposed(tensor.numpy()), dtype=tensor.dtype, name=name)

    shape = ir.Shape(list(reversed(shape_of(tensor))))
    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=name, cache=False)
