"""The graphs for ONNX Runtime's CPU provider, derived from the portable ones by passes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.graph.cpu.activation import QuickSilu
from medusa_export.graph.cpu.attention import GroupedAttention
from medusa_export.graph.cpu.integer import IntegerProducts
from medusa_export.graph.cpu.norm import SkipNorm
from medusa_export.graph.cpu.projections import MergeProjections
from medusa_export.graph.cpu.used import UsedEntries

__all__ = [
    "GroupedAttention",
    "IntegerProducts",
    "MergeProjections",
    "QuickSilu",
    "SkipNorm",
    "UsedEntries",
    "for_ort_cpu",
]


def for_ort_cpu(model: ir.Model, activation_bits: int = 16) -> None:
    """Make a portable float32 graph, its weights quantised or not, the fastest one for ONNX Runtime's CPU provider, in place.

    It computes the same but for rounding, and in a graph with int8 weights the activations are rounded as well.

    Args:
        model: a step graph or the heads.
        activation_bits: 8 or 16, of what int8 weights are multiplied with.
    """
    UsedEntries()(model)
    GroupedAttention()(model)
    MergeProjections()(model)
    QuickSilu()(model)
    SkipNorm()(model)
    IntegerProducts(activation_bits)(model)
    RemoveUnusedNodesPass()(model)
