"""Derives the graphs for ONNX Runtime's WebGPU provider from the portable ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.common.block_products import BlockProducts
from medusa_export.passes.ort_cpu.collect_sinks import CollectSinks
from medusa_export.passes.webgpu.cache_graph import cache_graph
from medusa_export.passes.webgpu.device_attention import DeviceAttention
from medusa_export.passes.webgpu.flat_gains import FlatGains
from medusa_export.passes.webgpu.read_rows import ReadRows
from medusa_export.passes.webgpu.scatter_entries import ScatterEntries
from medusa_runtime.bundle.manifest import CACHE, STEP

IN_FLOAT = 1  # an accuracy level of ``MatMulNBits``
log = logging.getLogger(__name__)


def for_webgpu(graphs: Mapping[str, ir.Model]) -> dict[str, ir.Model]:
    """Derive graphs of whose layers WebGPU runs every operator, and the one that edits the cache. The results are the same.

    Args:
        graphs: the portable graphs, step and heads: in float32 or float16, or with weights in blocks.

    Returns:
        The graphs by name; none if WebGPU has no kernels for the weights, as with one scale per column.
    """
    derived = {name: _derived(name, model.clone()) for name, model in graphs.items()}
    if any(node.op_type == "DequantizeLinear" for model in derived.values() for node in model.graph):
        log.info("no graphs for WebGPU, which has no products with integers that are not in blocks")
        return {}
    return derived | {CACHE: cache_graph(graphs[STEP])}


def _derived(name: str, model: ir.Model) -> ir.Model:
    log.info("graph %s for ONNX Runtime's WebGPU provider", name)
    if name == STEP:
        CollectSinks()(model)
        ScatterEntries()(model)
        DeviceAttention()(model)
        FlatGains()(model)
    else:
        ReadRows()(model)
    BlockProducts(IN_FLOAT)(model)
    RemoveUnusedNodesPass()(model)
    return model
