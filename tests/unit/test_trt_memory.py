"""Weights that TensorRT reads from mapped files."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.bundle.weights_file import write_weights
from medusa_export.engine.memory import MappedWeights


def graph_of(tensors: dict[str, np.ndarray]) -> ir.Model:
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in tensors.items()]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24}), ir_version=10)


def test_addresses_are_of_the_tensors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal((32, 64)).astype(np.float32) for name in ("first", "second")}
    model = graph_of(tensors | {"small": np.ones(2, np.float32)})
    write_weights([model], tmp_path)
    weights = MappedWeights(model, tmp_path)
    assert weights.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert ctypes.string_at(*weights.address(name)) == array.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    size = 64 << 20
    model = graph_of({"large": np.zeros(size, np.uint8)})
    write_weights([model], tmp_path)
    weights = MappedWeights(model, tmp_path)

    def read() -> int:
        before = mapped_bytes()
        ctypes.string_at(*weights.address("large"))
        return mapped_bytes() - before

    assert read() > size * 0.9
    before = mapped_bytes()
    with weights.released():
        deadline = time.monotonic() + 10
        while mapped_bytes() > before - size * 0.9 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mapped_bytes() <= before - size * 0.9


def mapped_bytes() -> int:
    """Bytes of mapped files that are in this process's memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssFile")) * 1024
