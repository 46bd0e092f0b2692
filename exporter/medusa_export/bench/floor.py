"""The least time a step of one token can take: its weights have to be read from memory once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from medusa_runtime.bundle.manifest import ORT_CPU, STEP, Manifest

REPEATS = 6
LEAST_BYTES, MOST_BYTES = 64 << 20, 1 << 30


def read_bandwidth(num_bytes: int, threads: int) -> float:
    """Bytes a second that this machine reads, with so many threads, from as much memory as a step reads.

    The best of several ways over some repeats. A sum in NumPy is bound by arithmetic in one thread and sees less than half of
    what a matrix product reads; here each thread runs wide loads with next to no arithmetic over its own part, and a
    product of a matrix with a vector runs over all of it. A working set that fits the last cache is read faster than one that
    does not, and so are a model's weights, so the size counts.
    """
    size = min(max(num_bytes, LEAST_BYTES), MOST_BYTES)
    columns = 4096
    matrix = np.ones((size // 4 // columns, columns), np.float32)
    vector = np.ones(columns, np.float32)
    words = np.array_split(matrix.reshape(-1).view(np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        ways: tuple[Callable[[], object], ...] = (
            lambda: list(pool.map(np.bitwise_or.reduce, words)),
            lambda: list(pool.map(np.max, words)),
            lambda: matrix @ vector,
        )
        best = min(_seconds(way) for _ in range(REPEATS) for way in ways)
    return matrix.nbytes / best


def step_weight_bytes(bundle: Path, manifest: Manifest) -> int | None:
    """Bytes of weights that a step reads whole: all of the CPU's step graph but tables it only looks rows up in.

    None where the packages that read ONNX files are not installed.
    """
    try:
        import onnx_ir as ir  # noqa: PLC0415 - the export extra
    except ImportError:
        return None
    graph = ir.load(bundle / manifest.graph(STEP, ORT_CPU).file).graph
    total = 0
    for value in graph.initializers.values():
        consumers = {use.node.op_type for use in value.uses()}
        if value.const_value is not None and not all(name.startswith("Gather") for name in consumers):
            total += value.const_value.nbytes
    return total


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
