"""Makes the heads of values as wide as those of keys, as TensorRT's attention wants them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import heads_and_width


class PadHeads(GraphPass):
    """Pad queries and keys, or values, with zeros, where their widths differ (latent attention).

    Needs: ``Attention`` nodes with a ``scale``, inputs of shape [B, H, T, D] with known H and D, and no past.
    Result: queries, keys and values of one width. Zeros in queries and keys change no score. Those in values give zeros in the
    result, which are cut off.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        matched = 0
        for node in [node for node in model.graph if node.op_type == "Attention"]:
            width, value_width = heads_and_width(node.inputs[1])[1], heads_and_width(node.inputs[2])[1]
            if width != value_width:
                for place in (2,) if value_width < width else (0, 1):
                    _pad(model.graph, node, place, abs(width - value_width))
                if value_width < width:
                    _cut(model.graph, node.outputs[0], node, value_width)
                matched += 1
        return matched


def _pad(graph: ir.Graph, attention: ir.Node, place: int, count: int) -> None:
    """Append `count` zeros to each row of an input."""
    value, tape = attention.inputs[place], ir.tape.Tape()
    assert value is not None
    assert value.shape is not None
    assert value.dtype is not None
    pads = tape.op("Constant", [], {"value": ir.tensor(np.array([0, count], np.int64))})
    zero = tape.op("Constant", [], {"value": ir.tensor(np.array(0, value.dtype.numpy()), dtype=value.dtype)})
    axis = tape.op("Constant", [], {"value": ir.tensor(np.array([3], np.int64))})
    padded = tape.op("Pad", [value, pads, zero, axis])
    padded.type, padded.shape = value.type, ir.Shape([*value.shape[:3], heads_and_width(value)[1] + count])
    graph.insert_before(attention, tape.nodes)
    attention.replace_input_with(place, padded)


def _cut(graph: ir.Graph, attended: ir.Value, attention: ir.Node, width: int) -> None:
    """Keep the first `width` numbers of each row of the result."""
    tape, readers = ir.tape.Tape(), list(attended.uses())
    start, stop, axis = (tape.op("Constant", [], {"value": ir.tensor(np.array([at], np.int64))}) for at in (0, width, 3))
    kept = tape.op("Slice", [attended, start, stop, axis])
    kept.type, kept.shape = attended.type, attended.shape
    if attended.shape is not None:
        attended.shape = ir.Shape([*attended.shape[:3], heads_and_width(attention.inputs[1])[1]])
    graph.insert_after(attention, tape.nodes)
    for reader, place in readers:
        reader.replace_input_with(place, kept)
