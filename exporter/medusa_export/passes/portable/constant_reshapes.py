"""Makes the target shapes of Reshape constant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import add_initializer


class ConstantReshapes(GraphPass):
    """Replace a target ``[batch, tokens, -1, D]``, computed at every step, by the constant ``[0, 0, H, D]``.

    Needs: known shapes of the reshaped values.
    Result: the target is constant if its leading dimensions are those of the input and the others are known. TensorRT needs a
    constant head count, and a step saves the nodes that computed the target.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        targets: dict[tuple[int, ...], ir.Value] = {}
        matched = 0
        for node in model.graph:
            if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
                continue
            if (target := _constant_target(node)) is None:
                self.decline("a target shape with unknown sizes that are not the input's")
                continue
            if target not in targets:
                name = "reshape_" + "_".join(map(str, target))
                targets[target] = add_initializer(model.graph, name, ir.tensor(np.array(target, np.int64), name=name))
            node.replace_input_with(1, targets[target])
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)  # so that 0 means "the input's size"
            matched += 1
        return matched


def _constant_target(node: ir.Node) -> tuple[int, ...] | None:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    kept = 0
    for before, after in zip(source.shape, result.shape, strict=False):
        if isinstance(after, int) or before != after:
            break
        kept += 1
    rest = [result.shape[axis] for axis in range(kept, len(result.shape))]
    if not all(isinstance(size, int) for size in rest):
        return None
    return (*[0] * kept, *(int(size) for size in rest))  # type: ignore[arg-type]
