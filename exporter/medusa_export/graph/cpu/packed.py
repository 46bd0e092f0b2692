"""Queries, keys and values as the merged projection gives them, rotated by the attention operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.values import constant, heads_and_width

HALF_WIDTHS = 8  # half a head's width must be a multiple of this


class PackedAttention(ir.passes.InPlacePass):
    """Let ``GroupQueryAttention`` take a merged projection whole, and rotate its queries and keys.

    Needs: the operator as `CachedAttention` leaves it, its query, key and value the three parts of one ``Split``, the first
    two through ``RotaryEmbedding`` with the same angles, made from ``position_ids``. Leaves: the whole product as its first
    input. The operator looks angles up in a table by position, and wants a row for each entry in use. Its table gets the
    angles of the step's tokens as its first rows, and their numbers in the step are their positions, so that angles may be
    computed in any way.
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
    """The product whose parts a node's query, key and value are, and the cosines and sines of their rotation. [1, T, D / 2]"""
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
    """Whether a node rotates whole heads, their two halves as pairs, by angles given for each token."""
    others = ("interleaved", "rotary_embedding_dim")
    is_rotation = node.op_type == "RotaryEmbedding" and len(node.inputs) == 3
    return is_rotation and not any(node.attributes.get_int(name, 0) for name in others)


class _Tables:
    """Angles by a token's number in the step, in as many rows as there are entries in use."""

    def __init__(self, graph: ir.Graph, tape: ir.tape.Tape, input_ids: ir.Value, lengths: ir.Value) -> None:
        self._graph, self._lengths = graph, lengths
        self._tables: dict[ir.Value, ir.Value] = {}
        self._rest: dict[int, ir.Value] = {}  # of a table, behind the step's tokens, by half a head's width
        count = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 1, "end": 2})])
        zero, one = (constant(graph, f"number_{number}", np.int64(number)) for number in (0, 1))
        self._first = constant(graph, "first_axis", [0])
        self.numbers = tape.op("Unsqueeze", [tape.op("Range", [zero, count, one]), self._first])  # [1, T]

    def of(self, tape: ir.tape.Tape, angles: ir.Value, half: int) -> ir.Value:
        """The table [S, half] of cosines or sines [1, T, half]. What it holds behind the step's tokens is read by nobody."""
        if half not in self._rest:
            sizes = tape.op("Concat", [self._lengths, constant(self._graph, f"half_{half}", [half])], {"axis": 0})
            self._rest[half] = tape.op("ConstantOfShape", [sizes])
        if angles not in self._tables:
            rows = tape.op("Squeeze", [angles, self._first])
            self._tables[angles] = tape.op("Concat", [rows, self._rest[half]], {"axis": 0})
        return self._tables[angles]
