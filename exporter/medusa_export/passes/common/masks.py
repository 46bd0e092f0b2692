"""Boolean attention masks as numbers to add to the scores."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.values import constant

# Half the lowest number, so that adding a score cannot overflow. -inf would not work: a kernel that reads the cache in blocks
# makes NaN of a block in which all entries are hidden.
HIDDEN = {ir.DataType.FLOAT: -1.7e38, ir.DataType.FLOAT16: -32752.0, ir.DataType.BFLOAT16: -1.7e38}


def additive_mask(graph: ir.Graph, tape: ir.tape.Tape, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Record the nodes that turn a boolean mask into 0 where a query sees a key, and a very low number elsewhere.

    Args:
        graph: the graph, for constants.
        tape: records the nodes.
        mask: bool, of any shape.
        dtype: the scores' type.

    Returns:
        The additive mask, of the mask's shape.
    """
    kind = dtype.name.lower()
    seen, hidden = (
        constant(graph, f"{name}_score_{kind}", dtype.numpy().type(score))
        for name, score in (("seen", 0.0), ("hidden", HIDDEN[dtype]))
    )
    result = tape.op("Where", [mask, seen, hidden])
    result.shape, result.type = mask.shape, ir.TensorType(dtype)
    return result
