"""Replaces boolean attention masks by additive ones."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.masks import additive_mask


class AdditiveMask(GraphPass):
    """Replace the boolean mask of attention by numbers to add to the scores, computed once for all layers.

    Needs: ``Attention`` nodes with a boolean mask.
    Result: the same attention, with an additive mask in the dtype of its keys. The compiler of TensorRT-RTX 1.7 fails on
    boolean masks in 16-bit graphs ("more than one op named … iota").
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        additive: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
            if mask is None or mask.dtype != ir.DataType.BOOL:
                continue
            if mask not in additive:
                key, tape = node.inputs[1], ir.tape.Tape()
                assert key is not None
                assert key.dtype is not None
                additive[mask] = additive_mask(model.graph, tape, mask, key.dtype)
                model.graph.insert_before(node, tape.nodes)
            node.replace_input_with(3, additive[mask])
        return len(additive)
