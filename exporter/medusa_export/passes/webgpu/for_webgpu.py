"""Derives the graphs for ONNX Runtime's WebGPU provider from the portable ones."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.ort_cpu.collect_sinks import CollectSinks
from medusa_export.passes.webgpu.device_attention import DeviceAttention
from medusa_export.passes.webgpu.read_rows import ReadRows
from medusa_export.passes.webgpu.scatter_entries import ScatterEntries
from medusa_runtime.bundle.manifest import STEP

log = logging.getLogger(__name__)


def for_webgpu(name: str, model: ir.Model) -> None:
    """Edit a portable float graph so that WebGPU runs every operator of its layers, in place. The results are the same.

    Args:
        name: ``step`` or ``heads``.
        model: the graph.
    """
    log.info("graph %s for ONNX Runtime's WebGPU provider", name)
    if name == STEP:
        CollectSinks()(model)
        ScatterEntries()(model)
        DeviceAttention()(model)
    else:
        ReadRows()(model)
    RemoveUnusedNodesPass()(model)
