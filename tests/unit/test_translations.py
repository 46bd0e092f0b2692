"""Operators that PyTorch's exporter does not know."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from medusa_export.trace.torch_to_onnx import export_module


class Inverse(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x)


def test_the_inverse_of_erf_is_that_of_pytorch() -> None:
    x = torch.linspace(-0.9999, 0.9999, 999)
    model = export_module("it", Inverse(), (x,), {}, {"x": None}, 24)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, torch.erfinv(x).numpy(), rtol=2e-5, atol=1e-6)
