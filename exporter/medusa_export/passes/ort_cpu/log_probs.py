"""Computes the log-probabilities of candidates by an operator that uses vector instructions."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import replace


class LogProbs(GraphPass):
    """Replace the logarithm of a sum of exponentials, which ONNX Runtime's CPU provider takes number by number.

    Needs: ``Sub(values, ReduceLogSumExp(x))``, with values and indices from a ``TopK`` of x. Both go over the last axis, which
    is kept.
    Result: ``GatherElements(LogSoftmax(x), indices)``.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        count = 0
        for node in [node for node in model.graph if node.op_type == "ReduceLogSumExp"]:
            x, axes = node.inputs
            is_last = axes is not None and axes.const_value is not None and axes.const_value.numpy().tolist() == [-1]
            if not is_last or node.attributes.get_int("keepdims", 1) != 1:
                self.decline("the sum is not over the last axis, or does not keep it")
                continue
            for usage in list(node.outputs[0].uses()):
                difference, values = usage.node, usage.node.inputs[0]
                source = None if values is None else values.producer()
                largest = source is not None and source.op_type == "TopK" and source.attributes.get_int("axis", -1) == -1
                if difference.op_type != "Sub" or source is None or not largest or source.inputs[0] is not x:
                    self.decline("it is not taken from the largest of the same numbers")
                    continue
                log_probs = ir.node("LogSoftmax", [x], {"axis": -1})
                chosen = ir.node("GatherElements", [log_probs.outputs[0], source.outputs[1]], {"axis": -1})
                model.graph.insert_before(difference, [log_probs, chosen])
                replace(difference.outputs[0], chosen.outputs[0])
                model.graph.remove(difference, safe=True)
                count += 1
        return count
