"""Fuses rotary position embedding into the standard operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Mul"})


class FuseRotary(ir.passes.InPlacePass):
    """Replace ``x · cos + rotate_half(x) · sin`` by ``RotaryEmbedding(x, cos, sin)``.

    Needs: cos and sin of shape [B, T, D] with two equal halves, as ``cat(freqs, freqs)`` makes them; x of shape [B, H, T, D];
    opset 23 or later.
    Result: one node for each rotated tensor. It reads the first halves of cos and sin.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in place."""
        rules = pattern.RewriteRuleSet([_Rotate.rule()])  # type: ignore[no-untyped-call]
        count = rules.apply_to_model(model)
        return ir.passes.PassResult(model, modified=count > 0)


class _Rotate(pattern.RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__("FuseRotary", remove_nodes=False)

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, start: Any, middle: Any, begin: Any, end: Any) -> Any:
        first = op.Slice(x, start, middle, [3], [1])
        second = op.Slice(x, begin, end, [3], [1])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return x * op.Unsqueeze(cos, [1]) + rotated * op.Unsqueeze(sin, [1])

    def check(self, _: Any, **values: ir.Value) -> Any:  # type: ignore[override]
        result = pattern.MatchResult()
        x, cos, sin = values["x"], values["cos"], values["sin"]
        if (sizes := _heads_and_width(x)) is None:
            return result.fail("the rotated tensor's head count or head size is unknown")
        half = sizes[1] // 2
        if _scalar(values["middle"]) != half or _scalar(values["begin"]) != half:
            return result.fail("the tensor is not rotated as two halves")
        if not (_halves_are_equal(cos) and _halves_are_equal(sin)):
            return result.fail("the two halves of cos or sin are not equal")
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        sizes = _heads_and_width(x)
        assert sizes is not None  # checked before
        heads, half = sizes[0], sizes[1] // 2
        cos_half = op.Slice(cos, op.Constant(value_ints=[0]), op.Constant(value_ints=[half]), op.Constant(value_ints=[2]))
        sin_half = op.Slice(sin, op.Constant(value_ints=[0]), op.Constant(value_ints=[half]), op.Constant(value_ints=[2]))
        return op.RotaryEmbedding(x, cos_half, sin_half, num_heads=heads)


def _heads_and_width(value: ir.Value) -> tuple[int, int] | None:
    """H and D of a value [B, H, T, D], or None if one is unknown."""
    if value.shape is None or len(value.shape) != 4:
        return None
    heads, width = value.shape[1], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _scalar(value: ir.Value) -> int | None:
    tensor = ir.convenience.get_const_tensor(value)
    return int(np.asarray(tensor.numpy()).item()) if tensor is not None and tensor.size == 1 else None


def _halves_are_equal(value: ir.Value | None) -> bool:
    """Whether the value is ``cat(f, f)`` along the last axis, possibly followed by element-wise operators with scalars."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            first = node.inputs[0]
            return len(node.inputs) == 2 and all(other is first for other in node.inputs)
        if node.op_type not in ELEMENTWISE or any(_scalar(other) is None for other in node.inputs[1:] if other):
            return False
        value = node.inputs[0]
    return False
