"""Passes the merged query, key and value projection to the attention operator, which also rotates it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.values import constant, heads_and_width

HALF_WIDTHS = 8  # half the head size must be a multiple of this


class PackedAttention(ir.passes.InPlacePass):
    """Give ``GroupQueryAttention`` the whole merged projection, and let it rotate queries and keys.

    Needs: the operator as `CachedAttention` makes it. Its query, key and value are the three parts of one ``Split``; query and
    key pass through ``RotaryEmbedding`` with the same cos and sin, computed from ``position_ids``.
    Result: the operator's first input is the whole projection. The operator indexes cos/sin tables by position id, and the
    tables need a row for each entry in use. We pass the cos/sin rows of this step's T tokens as the first T table rows and
    0…T-1 as position ids, so the model's own computation of the angles is kept.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        inputs = {value.name: value for value in model.graph.inputs}
        found = [
            (node, *parts)
            for node in model.graph
            if node.op_type == "GroupQueryAttention" and (parts := _packable(node)) is not None
        ]
        tables: _Tables | None = None
        for node, whole, cos, sin in found:
            tape = ir.tape.Tape()
            tables = tables or _Tables(model.graph, tape, inputs["input_ids"], inputs["cache_lengths"])
            rotation = [tables.of(tape, value, half=heads_and_width(node.inputs[3])[1] // 2) for value in (cos, sin)]
            model.graph.insert_before(node, tape.nodes)
            for place, value in enumerate([whole, None, None, *node.inputs[3:7], *rotation, tables.numbers]):
                node.replace_input_with(place, value)
            node.attributes.add(ir.AttrInt64("do_rotary", 1))
        return ir.passes.PassResult(model, modified=bool(found))


def _packable(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """The merged projection of a node's query, key and value, and the cos and sin of their rotation [1, T, D / 2]."""
    rotations = [value.producer() for value in node.inputs[:2] if value is not None]
    if len(rotations) != 2 or any(rotation is None or not _rotates_all(rotation) for rotation in rotations):
        return None
    query, key = (rotation.inputs for rotation in rotations if rotation is not None)
    parts, (cos, sin) = [query[0], key[0], node.inputs[2]], query[1:]
    split = query[0].producer() if query[0] is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != parts or key[1:] != query[1:]:
        return None
    fits = heads_and_width(node.inputs[3])[1] % (2 * HALF_WIDTHS) == 0
    return (split.inputs[0], cos, sin) if fits and split.inputs[0] and cos and sin else None


def _rotates_all(node: ir.Node) -> bool:
    """Whether a node rotates whole heads, not interleaved, by angles given for each token."""
    others = ("interleaved", "rotary_embedding_dim")
    is_rotation = node.op_type == "RotaryEmbedding" and len(node.inputs) == 3
    return is_rotation and not any(node.attributes.get_int(name, 0) for name in others)


class _Tables:
    """cos/sin tables indexed by a token's number in the step, with a row for each entry in use."""

    def __init__(self, graph: ir.Graph, tape: ir.tape.Tape, input_ids: ir.Value, lengths: ir.Value) -> None:
        self._graph, self._lengths = graph, lengths
        self._tables: dict[ir.Value, ir.Value] = {}
        self._rest: dict[int, ir.Value] = {}  # the unused rows after the step's tokens, by half the head size
        count = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 1, "end": 2})])
        zero, one = (constant(graph, f"number_{number}", np.int64(number)) for number in (0, 1))
        self._first = constant(graph, "first_axis", [0])
        self.numbers = tape.op("Unsqueeze", [tape.op("Range", [zero, count, one]), self._first])  # [1, T]

    def of(self, tape: ir.tape.Tape, angles: ir.Value, half: int) -> ir.Value:
        """The table [S, half] of cosines or sines [1, T, half]. Rows after the step's tokens are never read."""
        if half not in self._rest:
            sizes = tape.op("Concat", [self._lengths, constant(self._graph, f"half_{half}", [half])], {"axis": 0})
            self._rest[half] = tape.op("ConstantOfShape", [sizes])
        if angles not in self._tables:
            rows = tape.op("Squeeze", [angles, self._first])
            self._tables[angles] = tape.op("Concat", [rows, self._rest[half]], {"axis": 0})
        return self._tables[angles]
