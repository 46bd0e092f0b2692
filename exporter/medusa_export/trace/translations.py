"""Operators of PyTorch that its exporter does not translate to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

# Giles, "Approximating the erfinv function" (2012), table 1: the coefficients for single precision, highest power first.
CENTRAL = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
           0.246640727, 1.50140941)  # fmt: skip
TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047, 1.00167406,
        2.83297682)  # fmt: skip


def erfinv(x: Any) -> Any:
    """The inverse of the error function, of float32 values between -1 and 1, to a relative error of about 1e-6."""
    one = op.Constant(value_float=1.0)
    w = op.Neg(op.Log(op.Mul(op.Sub(one, x), op.Add(one, x))))
    central = _polynomial(CENTRAL, op.Sub(w, op.Constant(value_float=2.5)))
    tail = _polynomial(TAIL, op.Sub(op.Sqrt(op.Max(w, one)), op.Constant(value_float=3.0)))
    return op.Mul(op.Where(op.Less(w, op.Constant(value_float=5.0)), central, tail), x)


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    result = op.Constant(value_float=coefficients[0])
    for coefficient in coefficients[1:]:
        result = op.Add(op.Mul(result, x), op.Constant(value_float=coefficient))
    return result


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.erfinv.default: erfinv}
