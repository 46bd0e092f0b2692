"""Tests whether TensorRT-RTX supports a GPU, listed or not: it builds and loads an engine of one small layer.

    python scripts/rtx_verdict.py 9.0

It prints JSON with the outcome of each stage, for the given compute capability and for CURRENT, this machine's GPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):  # type: ignore[misc] # the module has no types
    """Collects warnings and errors."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """See TensorRT."""
        if severity <= trt.ILogger.WARNING:
            self.lines.append(message)


def verdict(member: str) -> dict[str, Any]:
    """Build and load an engine for one member of `ComputeCapability`."""
    log = Log()
    if member not in trt.ComputeCapability.__members__:
        return {"builds": False, "loads": False, "says": [f"there is no ComputeCapability.{member}"]}
    builder = trt.Builder(log)
    network = builder.create_network(0)
    layer = network.add_activation(network.add_input("x", trt.float32, (1, 8)), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[member], 0)
    plan = builder.build_serialized_network(network, config)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan) if plan is not None else None
    return {"builds": plan is not None, "loads": engine is not None, "says": log.lines}


def main(capability: str) -> None:
    """Test one capability and this machine's GPU."""
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    asked = ("SM" + capability.replace(".", ""), "CURRENT")
    print(json.dumps({"version": trt.__version__, "lists": names, **{name: verdict(name) for name in asked}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
