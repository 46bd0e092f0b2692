"""The graphs for ONNX Runtime's CPU provider, derived from the portable ones by passes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.graph.cpu.activation import QuickSilu
from medusa_export.graph.cpu.attention import GroupedAttention
from medusa_export.graph.cpu.cached import CachedAttention
from medusa_export.graph.cpu.integer import IntegerProducts
from medusa_export.graph.cpu.norm import SkipNorm
from medusa_export.graph.cpu.packed import PackedAttention
from medusa_export.graph.cpu.projections import MergeProjections
from medusa_export.graph.cpu.used import UsedEntries

__all__ = [
    "CachedAttention",
    "GroupedAttention",
    "IntegerProducts",
    "MergeProjections",
    "PackedAttention",
    "QuickSilu",
    "SkipNorm",
    "UsedEntries",
    "for_one_sequence",
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
    _finish(model, activation_bits)


def for_one_sequence(model: ir.Model, activation_bits: int = 16) -> bool:
    """Make a step graph that is faster still, and decodes one sequence at a time; see `for_ort_cpu`.

    Returns:
        Whether there is such a graph. If not, the model is of no use any more.
    """
    UsedEntries()(model)
    if not CachedAttention()(model).modified:
        return False
    GroupedAttention()(model)  # of layers that are of another kind
    MergeProjections()(model)
    PackedAttention()(model)
    _finish(model, activation_bits)
    return True


def _finish(model: ir.Model, activation_bits: int) -> None:
    QuickSilu()(model)
    SkipNorm()(model)
    IntegerProducts(activation_bits)(model)
    RemoveUnusedNodesPass()(model)
