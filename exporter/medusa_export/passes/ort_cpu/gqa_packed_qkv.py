"""Passes the merged query, key and value projection to the attention operator, which also rotates it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant, heads_and_width

ANGLES = 8  # the operator takes a multiple of so many angles a head


class PackedAttention(GraphPass):
    """Give ``GroupQueryAttention`` the whole merged projection, and let it rotate queries and keys.

    Needs: the operator as `CachedAttention` makes it. Its query, key and value are the three parts of one ``Split``; query and
    key pass through ``RotaryEmbedding`` with the same cos and sin, computed from ``position_ids``, and the same attributes.
    Result: the operator's first input is the whole projection. The operator indexes cos/sin tables by position id, and the
    tables need a row for each entry in use. We pass the cos/sin rows of this step's T tokens as the first T table rows and
    0…T-1 as position ids, so the model's own computation of the angles is kept.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        inputs = {value.name: value for value in model.graph.inputs}
        tables: _Tables | None = None
        count = 0
        for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
            found = _packing(node)
            if isinstance(found, str):
                self.decline(found)
                continue
            tape = ir.tape.Tape()
            tables = tables or _Tables(model.graph, tape, inputs["input_ids"], inputs["cache_lengths"])
            rotation = [tables.of(tape, value, half=found.num_angles) for value in (found.cos, found.sin)]
            model.graph.insert_before(node, tape.nodes)
            for place, value in enumerate([found.projection, None, None, *node.inputs[3:7], *rotation, tables.numbers]):
                node.replace_input_with(place, value)
            node.attributes.add(ir.AttrInt64("do_rotary", 1))
            node.attributes.add(ir.AttrInt64("rotary_interleaved", int(found.interleaved)))
            count += 1
        return count


@dataclass(frozen=True)
class _Packing:
    """What the operator reads instead: the merged projection, and the angles of its rotation [1, T, number of angles]."""

    projection: ir.Value
    cos: ir.Value
    sin: ir.Value
    num_angles: int  # half the rotated width of a head
    interleaved: bool


def _packing(node: ir.Node) -> _Packing | str:
    """What a node's query, key and value are made of; or why the operator cannot make them itself."""
    rotations = [value.producer() for value in node.inputs[:2] if value is not None]
    query, key = rotations if len(rotations) == 2 else (None, None)
    if (
        query is None
        or key is None
        or not all(one.op_type == "RotaryEmbedding" and len(one.inputs) == 3 for one in (query, key))
    ):
        return "queries and keys are not rotated by angles given for each token"
    named = ("interleaved", "rotary_embedding_dim")
    interleaved, width = (query.attributes.get_int(name, 0) for name in named)
    if query.inputs[1:] != key.inputs[1:] or [key.attributes.get_int(name, 0) for name in named] != [interleaved, width]:
        return "queries and keys are rotated differently"
    parts, (cos, sin) = [query.inputs[0], key.inputs[0], node.inputs[2]], query.inputs[1:]
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != parts or split.inputs[0] is None:
        return "queries, keys and values are not the three parts of one projection"
    num_angles = (width or heads_and_width(node.inputs[3])[1]) // 2
    if num_angles % ANGLES or cos is None or sin is None:
        return f"a head is rotated by {num_angles} angles, and the operator takes multiples of {ANGLES}"
    return _Packing(split.inputs[0], cos, sin, num_angles, bool(interleaved))


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
