"""Rotates the residual stream, so that no channel holds outliers (QuaRot's R1, arXiv:2404.00456)."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import add_initializer
from medusa_export.passes.quantize.orthogonal import Array, random_rotation, rotated
from medusa_export.passes.quantize.residual_stream import (
    NotExactError,
    Output,
    Read,
    ResidualStream,
    constant_numbers,
    residual_stream,
)
from medusa_export.passes.quantize.weight_edits import Change, WeightEdits

GAINS = "gains.moved"  # of all norms: ones
STATE_BASIS = "hidden.basis"  # the weight that gives the last hidden state back in its own basis


class RotateStream(GraphPass):
    """Multiply the residual stream with an orthogonal matrix R, by changing weights alone.

    Needs: a float32 step graph as the exporter writes it, whose stream is read and written by linear layers and normalized by
    ``RMSNormalization`` before each of them.
    Result: the same graph except for rounding. The norms' gains move into the weights that follow, and all weights that read
    or write the stream are multiplied with R. A table that is both embedding and LM head becomes two tables. The output
    ``hidden`` is still in its own basis: one product gives it back.

    If something does not commute with R, the graph stays as it was and `declined` says why.

    Args:
        seed: of R.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        try:
            stream = residual_stream(model.graph)
            rotation = random_rotation(stream.width, np.random.default_rng(self.seed))
            edits = _edits(stream, rotation)
        except NotExactError as error:
            self.decline(str(error))
            return 0
        for output in stream.outputs:
            _give_back(model.graph, output, rotation)
        edits.apply(model.graph)
        ones = add_initializer(model.graph, GAINS, ir.tensor(np.ones(stream.width, np.float32), name=GAINS))
        for norm in stream.norms:
            norm.replace_input_with(1, ones)
        RemoveUnusedNodesPass()(model)
        return len(stream.readers) + len(stream.writers)


def _edits(stream: ResidualStream, rotation: Array) -> WeightEdits:
    edits = WeightEdits()
    for gather in stream.tables:
        edits.add(gather, 0, "rows", partial(rotated, rotation=rotation, axis=1))
    for linear in stream.writers:
        edits.add_linear(linear, "written", partial(rotated, rotation=rotation, axis=1 - linear.input_axis))
    for node, place in stream.biases:
        edits.add(node, place, "bias", partial(rotated, rotation=rotation, axis=0))
    for read in stream.readers:
        edits.add_linear(read.linear, ("read", read.gain), _reading(read, rotation))
    return edits


def _reading(read: Read, rotation: Array) -> Change:
    """How the weight of a layer that reads the stream changes."""
    axis, gains = read.linear.input_axis, None if read.gain is None else constant_numbers(read.gain)

    def change(array: Array) -> Array:
        if gains is not None:
            array = array * (gains[:, None] if axis == 0 else gains)
        return rotated(array, rotation, axis)

    return change


def _give_back(graph: ir.Graph, output: Output, rotation: Array) -> None:
    """Return a value of the stream as it was before: multiplied with the transpose of R, then with the norm's gains."""
    gains = None if output.gain is None else constant_numbers(output.gain)
    basis = rotation.T if gains is None else rotation.T * gains
    name = output.value.name
    weight = add_initializer(graph, STATE_BASIS, ir.tensor(np.ascontiguousarray(basis), name=STATE_BASIS))
    product = ir.node("MatMul", [output.value, weight])
    node = output.value.producer()
    assert node is not None
    graph.insert_after(node, product)
    result = product.outputs[0]
    result.shape, result.type = output.value.shape, output.value.type
    graph.outputs[list(graph.outputs).index(output.value)] = result
    output.value.name, result.name = f"{name}.rotated", name
