"""Turns a torch module into a simplified ONNX graph."""

from __future__ import annotations

import re
from typing import Any, cast

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

from medusa_export.model.checkpoint import unsupported
from medusa_export.passes.portable.constant_reshapes import ConstantReshapes
from medusa_export.passes.portable.fuse_rotary import FuseRotary
from medusa_export.passes.portable.merge_attention import MergeAttention
from medusa_export.passes.portable.simplify import Simplify
from medusa_export.trace.quiet import quiet_torch, without_garbage_collection
from medusa_export.trace.stored_layers import is_stored
from medusa_export.trace.translations import TRANSLATIONS
from medusa_runtime.errors import first_line


def export_module(
    what: str,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    opset: int,
) -> ir.Model:
    with quiet_torch(), without_garbage_collection(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                args,
                kwargs=kwargs,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=dict(TRANSLATIONS),
                optimize=False,  # `Simplify` does the necessary part in a fraction of the time
                verbose=False,
            )
        except Exception as error:  # the exporter wraps any exception of a model's code
            raise unsupported(what, _reason(error)) from error
    assert program is not None
    return program.model


def _reason(error: Exception) -> str:
    text = first_line(error.__cause__ or error)
    operator = re.search(r"translating node .*target=torch\.ops\.([\w.]+)", text)
    return text if operator is None else f"PyTorch's exporter has no ONNX for its operator {operator[1]}"


def simplify(model: ir.Model) -> None:
    Simplify()(model)
    fuse_rms_normalization(model)
    FuseRotary()(model)
    ConstantReshapes()(model)
    ir.passes.Sequential(IdentityEliminationPass(), CommonSubexpressionEliminationPass())(model)
    MergeAttention()(model)  # once equal masks are one
    ir.passes.Sequential(TopologicalSortPass(), RemoveUnusedNodesPass())(model)


def name_values(values: Any, names: list[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def tensor_of(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A module's tensor by its dotted name: a parameter, or a buffer, which a state dict may lack."""
    tensor: Any = module
    for part in name.split("."):
        tensor = getattr(tensor, part)
    return cast("torch.Tensor", tensor)


def torch_tensor(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> ir.TensorProtocol:
    """A weight of a graph. One that is stored in another half precision is cast when it is written."""
    stored = tensor.detach()
    if not is_stored(stored, dtype):
        return ir.tensor_adapters.TorchTensor(stored, name=name)
    return ir.LazyTensor(
        lambda: ir.tensor_adapters.TorchTensor(stored.to(dtype), name=name),
        dtype=ir.tensor_adapters.from_torch_dtype(dtype),
        shape=ir.Shape(stored.shape),
        name=name,
        cache=False,
    )
