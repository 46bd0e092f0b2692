"""Passes that derive the graphs for ONNX Runtime's CPU provider from the portable ones."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.common.block_products import BlockProducts
from medusa_export.passes.ort_cpu.collect_sinks import CollectSinks
from medusa_export.passes.ort_cpu.gqa import CachedAttention
from medusa_export.passes.ort_cpu.gqa_packed_qkv import PackedAttention
from medusa_export.passes.ort_cpu.grouped_attention import GroupedAttention
from medusa_export.passes.ort_cpu.integer_matmul import IntegerProducts
from medusa_export.passes.ort_cpu.log_probs import LogProbs
from medusa_export.passes.ort_cpu.merge_projections import MergeProjections
from medusa_export.passes.ort_cpu.moe import FuseExperts
from medusa_export.passes.ort_cpu.quick_silu import QuickSilu
from medusa_export.passes.ort_cpu.skip_norm import SkipNorm
from medusa_export.passes.ort_cpu.slice_used import UsedEntries

ACTIVATIONS_IN_8_BITS = 4  # an accuracy level of ``MatMulNBits``; its kernels for float32 are several times slower
log = logging.getLogger(__name__)

__all__ = [
    "CachedAttention",
    "CollectSinks",
    "FuseExperts",
    "GroupedAttention",
    "IntegerProducts",
    "LogProbs",
    "MergeProjections",
    "PackedAttention",
    "QuickSilu",
    "SkipNorm",
    "UsedEntries",
    "for_one_sequence",
    "for_ort_cpu",
]


def for_ort_cpu(model: ir.Model, activation_bits: int = 16) -> None:
    """Optimise a portable float32 graph for ONNX Runtime's CPU provider, in place. Its weights may be quantised.

    The results are the same except for rounding. If the weights are int8, the activations are rounded to integers as well.

    Args:
        model: a step graph or a heads graph.
        activation_bits: 8 or 16, for the activations that are multiplied with int8 weights.
    """
    log.info("graph %s for ONNX Runtime's CPU provider", model.graph.name)
    FuseExperts()(model)
    CollectSinks()(model)
    UsedEntries()(model)
    GroupedAttention()(model)
    BlockProducts(ACTIVATIONS_IN_8_BITS)(model)
    MergeProjections()(model)
    _finish(model, activation_bits)


def for_one_sequence(model: ir.Model, activation_bits: int = 16) -> bool:
    """Make an even faster step graph that decodes only one sequence at a time; see `for_ort_cpu`.

    Returns:
        Whether such a graph exists. If not, the model is left half-edited and must not be used.
    """
    log.info("graph %s for one sequence", model.graph.name)
    FuseExperts()(model)
    CollectSinks()(model)
    UsedEntries()(model)
    if not CachedAttention()(model).modified:
        return False
    GroupedAttention()(model)  # for layers that `CachedAttention` does not support
    BlockProducts(ACTIVATIONS_IN_8_BITS)(model)
    MergeProjections()(model)
    PackedAttention()(model)
    _finish(model, activation_bits)
    return True


def _finish(model: ir.Model, activation_bits: int) -> None:
    QuickSilu()(model)
    LogProbs()(model)
    SkipNorm()(model)
    IntegerProducts(activation_bits)(model)
    RemoveUnusedNodesPass()(model)
