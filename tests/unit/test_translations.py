"""Operators that PyTorch's exporter does not know, computed by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from medusa_export.errors import ExportError
from medusa_export.trace.torch_to_onnx import export_module


class Inverse(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x)


def test_the_inverse_error_function_is_as_exact_as_single_precision() -> None:
    x = np.concatenate([np.linspace(-0.99999, 0.99999, 2001), [0.0, 1e-6, -1e-6]]).astype("f")
    model = export_module("a module", Inverse(), (torch.tensor(x),), {}, {"x": {}}, 24)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x})
    wanted = torch.erfinv(torch.tensor(x, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-9)


class Unknown(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i1e(x)


def test_an_operator_without_a_translation_is_named() -> None:
    with pytest.raises(ExportError, match=r"PyTorch's exporter has no ONNX for its operator prims\.bessel_i1e"):
        export_module("a module", Unknown(), (torch.ones(3),), {}, {"x": {}}, 24)
