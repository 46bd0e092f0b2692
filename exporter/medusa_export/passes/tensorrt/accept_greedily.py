"""Adds greedy acceptance to the step graph, so that the heads can run right after it, without waiting for the host."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_runtime.backends.gpu.step import ACCEPTED_HIDDEN, ACCEPTED_IDS, ACCEPTED_ROWS
from medusa_runtime.bundle.manifest import GraphFacts, TensorFacts


class AcceptGreedily(GraphPass):
    """Compute for each sequence the deepest row that greedy decoding accepts, its hidden state, and the token decided there.

    Needs: the step graph of docs/onnx-contract.md; another graph is not changed.
    Result: three more outputs, ``accepted_rows`` [B], ``accepted_ids`` [B] and ``accepted_hidden`` [B, C].

    A row is right if its token is the greedy one after its parent's. It is accepted if all rows that it attends to are right.
    A row that attends only to itself is a root, and right. Of several deepest rows the first is chosen: padding comes last.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Extend in place."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        outputs = {value.name: value for value in graph.outputs}
        if not {"input_ids", "tree_mask", "logit_rows"} <= inputs.keys() or not {"greedy_ids", "hidden"} <= outputs.keys():
            self.decline("a graph without the inputs and outputs of a step")
            return 0
        shape = outputs["hidden"].shape
        assert shape is not None
        writer = _Writer(ir.tape.Tape())
        rows, ids, hidden = writer.accepted(
            inputs["input_ids"], inputs["tree_mask"], inputs["logit_rows"], outputs["greedy_ids"], outputs["hidden"]
        )
        for value, name in ((rows, ACCEPTED_ROWS), (ids, ACCEPTED_IDS)):
            value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.INT64), ir.Shape([shape[0]])
        hidden.name, hidden.type, hidden.shape = ACCEPTED_HIDDEN, outputs["hidden"].type, ir.Shape([shape[0], shape[2]])
        graph.extend(writer.tape.nodes)
        graph.outputs.extend([rows, ids, hidden])
        return 1


def with_acceptance(step: GraphFacts) -> GraphFacts:
    """The facts of a step graph after `AcceptGreedily`."""
    hidden = next(tensor for tensor in step.outputs if tensor.name == "hidden")
    batch, _, width = hidden.shape
    rows, ids = (TensorFacts(name=name, dtype="int64", shape=[batch]) for name in (ACCEPTED_ROWS, ACCEPTED_IDS))
    states = TensorFacts(name=ACCEPTED_HIDDEN, dtype=hidden.dtype, shape=[batch, width])
    return step.model_copy(update={"outputs": [*step.outputs, rows, ids, states]})


class _Writer:
    """Writes the nodes. Booleans are 1 and 0 in float32, since every runtime has sum and max kernels for that type."""

    def __init__(self, tape: ir.tape.Tape) -> None:
        self.tape = tape

    def accepted(
        self, input_ids: ir.Value, tree_mask: ir.Value, logit_rows: ir.Value, greedy_ids: ir.Value, hidden: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        op = self.tape.op
        axis_1, axis_2 = self._ints([1]), self._ints([2])
        tokens = op("GatherElements", [input_ids, logit_rows], {"axis": 1})  # [B, R]
        seen = self._seen(tree_mask, logit_rows)  # [B, R, R]: [i, j] is 1 if row j attends to row i
        depths = op("ReduceSum", [seen, axis_1], {"keepdims": 0})  # [B, R]: 1 for a root

        by_depth = op("Unsqueeze", [depths, axis_2])  # [B, R, 1]
        above = op("Less", [by_depth, op("Unsqueeze", [depths, axis_1])])  # [B, R, R]
        ancestors = op("Mul", [op("Mul", [seen, self._float(above)]), by_depth])
        parents = op("ArgMax", [ancestors], {"axis": 1, "keepdims": 0})  # [B, R]: the deepest ancestor; 0 for a root
        expected = op("GatherElements", [greedy_ids, parents], {"axis": 1})
        is_root = op("Less", [depths, self._floats(1.5)])
        wrong = op("Not", [op("Or", [op("Equal", [tokens, expected]), is_root])])  # [B, R]

        faults = op("Mul", [seen, op("Unsqueeze", [self._float(wrong), axis_2])])
        rejected = op("ReduceMax", [faults, axis_1], {"keepdims": 0})  # [B, R]
        accepted_depths = op("Mul", [depths, op("Sub", [self._floats(1.0), rejected])])
        row = self._deepest(accepted_depths)  # [B]
        place = op("Unsqueeze", [row, axis_1])  # [B, 1]
        decided = op("Squeeze", [op("GatherElements", [greedy_ids, place], {"axis": 1}), axis_1])
        return row, decided, op("GatherND", [hidden, place], {"batch_dims": 1})

    def _seen(self, tree_mask: ir.Value, logit_rows: ir.Value) -> ir.Value:
        """The transposed mask between the evaluated rows. [B, R, R]"""
        op, index = self.tape.op, self.tape.op("Unsqueeze", [logit_rows, self._ints([2])])  # [B, R, 1]
        rows = op("GatherND", [self._float(tree_mask), index], {"batch_dims": 1})  # [B, R, T]
        return op("GatherND", [op("Transpose", [rows], {"perm": [0, 2, 1]}), index], {"batch_dims": 1})

    def _deepest(self, depths: ir.Value) -> ir.Value:
        """The first of the deepest rows. [B] Of equal values, ArgMax of some runtimes does not choose the first."""
        op = self.tape.op
        num_rows = op("Shape", [depths], {"start": 1, "end": 2})
        count = op("Squeeze", [self._float(num_rows)])
        places = op("Div", [op("Range", [self._floats(0.0), count, self._floats(1.0)]), count])  # [R], below 1
        return op("ArgMax", [op("Sub", [depths, places])], {"axis": 1, "keepdims": 0})

    def _float(self, value: ir.Value) -> ir.Value:
        return self.tape.op("Cast", [value], {"to": ir.DataType.FLOAT})

    def _floats(self, number: float) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.tensor(np.array(number, np.float32))})

    def _ints(self, numbers: list[int]) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
