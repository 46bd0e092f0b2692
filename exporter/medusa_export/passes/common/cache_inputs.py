"""The step graph's cache inputs; see docs/onnx-contract.md."""

from __future__ import annotations

import onnx_ir as ir

PAST_PREFIX = "past."
CAPACITY_AXIS = 2  # of a cache tensor: [B, Hkv, S, D]


def cache_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The graph's cache inputs, in order."""
    return [value for value in graph.inputs if (value.name or "").startswith(PAST_PREFIX)]
