"""The step graph's cache inputs; see docs/onnx-contract.md."""

from __future__ import annotations

import onnx_ir as ir

from medusa_runtime.bundle.cache_layout import PAST


def cache_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The graph's cache inputs, in order."""
    return [value for value in graph.inputs if (value.name or "").startswith(PAST)]
