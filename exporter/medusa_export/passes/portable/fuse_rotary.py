"""Fuses rotary position embedding into the standard operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import constant, replace

ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Mul", "Unsqueeze"})  # with scalars, if they have a second input


class FuseRotary(GraphPass):
    """Replace the rotation that a decoder spells out by ``RotaryEmbedding``.

    Matched pattern, where R is the rotated width of a head (cos and sin: [B, 1, T, R])::

        y = x · cos + rotated(x) · sin                    x: [B, H, T, R]
        rotated(x) = Concat(-x[R/2:], x[:R/2])            in halves (Llama): cos and sin have two equal halves
        rotated(x) = x with each pair (a, b) as (-b, a)   interleaved (Cohere, GLM, ERNIE): each pair of cos and sin is equal

    Replacement: ``y = RotaryEmbedding(x, cos', sin', interleaved)``, where cos' and sin' [B, T, R / 2] keep one of two equal
    numbers. If y is then joined with the rest of a wider head, ``Concat(y, x[R:])``, the operator reads the whole head, with
    ``rotary_embedding_dim = R``.

    Needs: known H and R; opset 23 or later.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Fuse in place."""
        count = 0
        for node in list(model.graph):
            rotation = _rotation(node) if node.op_type == "Add" else None
            if rotation is None:
                continue
            if (reason := rotation.problem()) is not None:
                self.decline(reason)
                continue
            rotation.fuse(model.graph)
            count += 1
        return count


@dataclass(frozen=True)
class _Rotation:
    """A rotation that was found: ``add`` computes x · cos + rotated(x) · sin."""

    add: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool

    def problem(self) -> str | None:
        """Why the operator cannot do this rotation; None if it can."""
        if self.x.shape is None or len(self.x.shape) != 4 or not all(isinstance(self.x.shape[axis], int) for axis in (1, 3)):
            return "the number or the size of the rotated heads is unknown"
        for angles in (self.cos, self.sin):
            if angles.shape is None or len(angles.shape) != 4 or angles.shape[1] != 1 or angles.shape[3] != self.x.shape[3]:
                return "cos or sin is not [B, 1, T, size of a head]"
            if not (_pairs_are_equal(angles) if self.interleaved else _halves_are_equal(angles)):
                return f"the two {'parts of each pair' if self.interleaved else 'halves'} of cos or sin are not equal"
        return None

    def fuse(self, graph: ir.Graph) -> None:
        """Replace the nodes by the operator."""
        assert self.x.shape is not None
        heads, width = self.x.shape[1], self.x.shape[3]
        assert isinstance(heads, int)
        assert isinstance(width, int)
        tape = ir.tape.Tape()
        angles = [self._one_of_each(graph, tape, value, width) for value in (self.cos, self.sin)]
        whole, joined = _wider_head(self.add, self.x, width)
        attributes: dict[str, ir.Attr | int] = {"num_heads": heads, "interleaved": int(self.interleaved)}
        if joined is not None:
            attributes["rotary_embedding_dim"] = width
        result = tape.op("RotaryEmbedding", [whole, *angles], attributes)
        last = joined or self.add
        graph.insert_before(last, tape.nodes)
        replace(last.outputs[0], result)
        graph.remove(last, safe=True)

    def _one_of_each(self, graph: ir.Graph, tape: ir.tape.Tape, angles: ir.Value, width: int) -> ir.Value:
        """One of two equal numbers of cos or sin. [B, 1, T, R] -> [B, T, R / 2]"""
        start, axis = constant(graph, "rotary_start", [0]), constant(graph, "rotary_axis", [3])
        end, step = (width, 2) if self.interleaved else (width // 2, 1)
        cut = [start, constant(graph, f"rotary_end_{end}", [end]), axis, constant(graph, f"rotary_step_{step}", [step])]
        half = tape.op("Slice", [angles, *cut])
        return tape.op("Squeeze", [half, constant(graph, "rotary_heads_axis", [1])])


def _rotation(add: ir.Node) -> _Rotation | None:
    """The rotation that an addition completes; None if it is another addition."""
    products = [_producer(value, "Mul") for value in add.inputs]
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            continue
        for place, value in enumerate(turned.inputs):
            if (found := _rotated(value)) is None:
                continue
            x, interleaved = found
            if x in plain.inputs:
                cos, sin = plain.inputs[1 - plain.inputs.index(x)], turned.inputs[1 - place]
                if cos is not None and sin is not None:
                    return _Rotation(add, x, cos, sin, interleaved)
    return None


def _rotated(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """X and whether it is interleaved, if a value is ``rotated(x)``."""
    if (concat := _producer(value, "Concat")) is not None and len(concat.inputs) == 2:
        return _in_halves(concat)
    reshape = _producer(value, "Reshape")
    stack = _producer(reshape.inputs[0], "Concat") if reshape is not None else None
    if stack is None or len(stack.inputs) != 2 or stack.attributes.get_int("axis", 0) not in (-1, 4):
        return None
    parts = [_producer(part, "Unsqueeze") for part in stack.inputs]
    if parts[0] is None or parts[1] is None or not all(_numbers(part.inputs[1]) in ([-1], [4]) for part in parts if part):
        return None
    negated = _producer(parts[0].inputs[0], "Neg")
    odd, even = (_slice(part) for part in (negated.inputs[0] if negated else None, parts[1].inputs[0]))
    if odd is None or even is None or odd.x is not even.x:
        return None
    is_pairs = (odd.start, odd.step, even.start, even.step) == (1, 2, 0, 2) and min(odd.end, even.end) >= odd.width
    return (odd.x, True) if is_pairs and reshape is not None and _is_flat(reshape, odd.x) else None


def _in_halves(concat: ir.Node) -> tuple[ir.Value, bool] | None:
    negated = _producer(concat.inputs[0], "Neg")
    second, first = (_slice(part) for part in (negated.inputs[0] if negated else None, concat.inputs[1]))
    if second is None or first is None or second.x is not first.x or concat.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    half = first.width // 2
    ranges = (first.start, first.end, first.step, second.start, second.step)
    return (first.x, False) if ranges == (0, half, 1, half, 1) and second.end >= first.width else None


def _is_flat(reshape: ir.Node, x: ir.Value) -> bool:
    """Whether a Reshape joins the pairs [.., R / 2, 2] of x again."""
    shape = reshape.outputs[0].shape
    return shape is not None and x.shape is not None and len(shape) == len(x.shape) == 4 and shape[3] == x.shape[3]


def _wider_head(add: ir.Node, x: ir.Value, width: int) -> tuple[ir.Value, ir.Node | None]:
    """What the operator reads, and the Concat that joins the rotated part with the rest of the head, if there is one."""
    part, uses = _slice(x), list(add.outputs[0].uses())
    if part is None or (part.start, part.end, part.step) != (0, width, 1) or len(uses) != 1 or add.outputs[0].is_graph_output():
        return x, None
    concat = uses[0].node
    joins = concat.op_type == "Concat" and len(concat.inputs) == 2 and concat.attributes.get_int("axis", 0) in (-1, 3)
    rest = _slice(concat.inputs[1]) if joins and uses[0].idx == 0 else None
    fits = rest is not None and rest.x is part.x and (rest.start, rest.step) == (width, 1) and rest.end >= rest.width
    return (part.x, concat) if fits else (x, None)


@dataclass(frozen=True)
class _Slice:
    """A slice of the last axis of a value [B, H, T, D] with known D."""

    x: ir.Value
    width: int  # D
    start: int
    end: int
    step: int


def _slice(value: ir.Value | None) -> _Slice | None:
    node = _producer(value, "Slice")
    x = node.inputs[0] if node is not None else None
    if node is None or x is None or x.shape is None or len(x.shape) != 4 or not isinstance(width := x.shape[3], int):
        return None
    numbers = [_numbers(part) for part in node.inputs[1:]]
    if len(numbers) < 3 or any(number is None or len(number) != 1 for number in numbers) or numbers[2] not in ([3], [-1]):
        return None
    start, end, _, step = [number[0] for number in [*numbers, [1]][:4] if number is not None]
    return _Slice(x, width, start, end, step)


def _halves_are_equal(value: ir.Value | None) -> bool:
    """Whether the value is ``cat(f, f)`` along the last axis, possibly followed by element-wise operators with scalars."""
    node = _source_of_angles(value)
    return (
        node is not None
        and node.op_type == "Concat"
        and len(node.inputs) == 2
        and node.inputs[0] is node.inputs[1]
        and node.attributes.get_int("axis", 0) in (-1, _rank(node.outputs[0]) - 1)
    )


def _pairs_are_equal(value: ir.Value | None) -> bool:
    """Whether the value is ``repeat_interleave(f, 2)`` along the last axis, possibly followed by element-wise operators."""
    node = _source_of_angles(value)
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
        return False
    pairs, result = node.inputs[0], node.outputs[0]
    if pairs.shape is None or result.shape is None or len(pairs.shape) != len(result.shape) + 1 or pairs.shape[-1] != 2:
        return False
    expand = _producer(pairs, "Expand")
    column = _producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if column is None or column.outputs[0].shape is None or column.outputs[0].shape[-1] != 1:
        return False
    return isinstance(pairs.shape[-2], int) and result.shape[-1] == 2 * pairs.shape[-2]


def _source_of_angles(value: ir.Value | None) -> ir.Node | None:
    """The first node, going back, that is not element-wise with scalars and keeps the last axis."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ELEMENTWISE:
            return node
        if node.op_type == "Unsqueeze":
            if _numbers(node.inputs[1]) != [1] or _rank(node.outputs[0]) < 3:
                return None
        elif any(other is not None and not _is_scalar(other) for other in node.inputs[1:]):
            return None
        value = node.inputs[0]
    return None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant [N]; None if the value is not a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return [int(number) for number in np.ravel(tensor.numpy())] if tensor is not None and tensor.size < 8 else None


def _is_scalar(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)
