"""Rotary position embedding as the standard operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Mul"})


class FuseRotary(ir.passes.InPlacePass):
    """``x · cos + rotate_half(x) · sin`` becomes ``RotaryEmbedding(x, cos, sin)``.

    Needs: cos and sin as [B, T, D] whose two halves are equal, as ``cat(freqs, freqs)`` makes them; a [B, H, T, D] input.
    Leaves: one node for each rotated tensor, fed by the first halves of cos and sin. Opset 23 or later.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in place."""
        count = pattern.RewriteRuleSet([_Rotate.rule()]).apply_to_model(model)
        return ir.passes.PassResult(model, modified=count > 0)


class _Rotate(pattern.RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__("FuseRotary", remove_nodes=False)

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, start: Any, middle: Any, begin: Any, end: Any) -> Any:
        first = op.Slice(x, start, middle, [3], [1])
        second = op.Slice(x, begin, end, [3], [1])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return x * op.Unsqueeze(cos, [1]) + rotated * op.Unsqueeze(sin, [1])

    def check(
        self, context: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, middle: ir.Value, begin: ir.Value, **_: Any
    ) -> pattern.MatchResult:
        result = pattern.MatchResult()
        if x.shape is None or len(x.shape) != 4 or not all(isinstance(x.shape[axis], int) for axis in (1, 3)):
            return result.fail("the rotated tensor's heads and width are not known")
        half = int(x.shape[3]) // 2
        if _scalar(middle) != half or _scalar(begin) != half:
            return result.fail("the tensor is not rotated by halves")
        if not (_halves_are_equal(cos) and _halves_are_equal(sin)):
            return result.fail("cos and sin do not repeat themselves")
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        assert x.shape is not None  # checked above
        heads, half = int(x.shape[1]), int(x.shape[3]) // 2
        cos_half = op.Slice(cos, op.Constant(value_ints=[0]), op.Constant(value_ints=[half]), op.Constant(value_ints=[2]))
        sin_half = op.Slice(sin, op.Constant(value_ints=[0]), op.Constant(value_ints=[half]), op.Constant(value_ints=[2]))
        return op.RotaryEmbedding(x, cos_half, sin_half, num_heads=heads)


def _scalar(value: ir.Value) -> int | None:
    tensor = ir.convenience.get_const_tensor(value)
    return int(np.asarray(tensor.numpy()).item()) if tensor is not None and tensor.size == 1 else None


def _halves_are_equal(value: ir.Value | None) -> bool:
    """Whether the last axis is ``cat(f, f)``, perhaps under element-wise operators with scalars."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            first = node.inputs[0]
            return len(node.inputs) == 2 and all(other is first for other in node.inputs)
        if node.op_type not in ELEMENTWISE or any(_scalar(other) is None for other in node.inputs[1:] if other):
            return False
        value = node.inputs[0]
    return False
