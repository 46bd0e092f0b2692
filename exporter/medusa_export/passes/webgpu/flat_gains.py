"""Norms whose gains have one dimension, as WebGPU requires."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant, replace


class FlatGains(GraphPass):
    """Multiply with the gains of a norm behind it, where they have several dimensions: one row for each head, for example.

    Needs: ``RMSNormalization(x, gains)`` over the last axis, with x [.., D] of known D and gains [.., D].
    Result: ``RMSNormalization(x, ones [D])`` and ``Mul``. WebGPU's kernel takes only gains [D]. Gains that are ones of x's
    shape, as PyTorch writes a norm without gains, are left out.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        count = 0
        for node in [node for node in model.graph if node.op_type == "RMSNormalization"]:
            x, gains = node.inputs
            assert x is not None
            assert gains is not None
            if gains.shape is None or len(gains.shape) == 1:
                continue
            width = x.shape[-1] if x.shape is not None else None
            if node.attributes.get_int("axis", -1) not in (-1, len(x.shape or []) - 1) or not isinstance(width, int):
                self.decline("it is over several axes, or its width is unknown")
                continue
            assert gains.dtype is not None
            ones = constant(model.graph, f"ones_{width}_{gains.dtype.name.lower()}", np.ones(width, gains.dtype.numpy()))
            tape = ir.tape.Tape()
            result = tape.op("RMSNormalization", [x, ones], dict(node.attributes))
            if not _are_ones(gains):
                result = tape.op("Mul", [result, gains])
            model.graph.insert_before(node, tape.nodes)
            replace(node.outputs[0], result)
            model.graph.remove(node, safe=True)
            count += 1
        return count


def _are_ones(gains: ir.Value) -> bool:
    source = gains.producer()
    if source is None or source.op_type != "ConstantOfShape":
        return False
    value = source.attributes.get("value")
    return value is not None and float(value.as_tensor().numpy().item()) == 1.0
