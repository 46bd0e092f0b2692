"""Makes the capacity of the KV cache static."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.cache_inputs import cache_inputs
from medusa_export.passes.common.graph_pass import GraphPass
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS


class StaticCapacity(GraphPass):
    """Make the cache's capacity static: TensorRT can update a cache in place only then.

    Needs: ``past.*`` inputs of shape [B, Hkv, S, D] with one name for S.
    Result: S is a number, in these and in all other shapes. Batch, tokens and rows stay dynamic.

    Args:
        capacity: S, the entries per slot.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        pasts = cache_inputs(model.graph)
        names = {str(value.shape[CAPACITY_AXIS]): self.capacity for value in pasts if value.shape is not None}
        matched = 0
        for value in (*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)):
            if value.shape is not None and any(_names(size) & names.keys() for size in value.shape):
                value.shape = ir.Shape([size if isinstance(size, int) else size.evaluate(names) for size in value.shape])
                matched += 1
        return matched


def _names(size: int | ir.SymbolicDim) -> frozenset[str]:
    """The names in a dimension, which may be an expression such as batch*capacity."""
    return frozenset(size.free_symbols()) if isinstance(size, ir.SymbolicDim) and size.value is not None else frozenset()
