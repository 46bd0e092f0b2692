"""A lower bound for the time of a step of one token: all weights must be read from memory once."""

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
    """Memory bandwidth of this machine in bytes per second, with `threads` threads and `num_bytes` of memory.

    It is the best of several methods and repeats. A sum in NumPy is limited by arithmetic in one thread and reaches less than
    half of the bandwidth of a matrix product. So each thread runs wide loads with almost no arithmetic over its own part, and
    a matrix-vector product runs over all of it. The size matters: memory that fits into the last-level cache is read faster,
    and that is true for a model's weights too.
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
    """Bytes of weights that a step reads completely: all of the CPU's step graph, except weights it only gathers rows from.

    None if the packages that read ONNX files are not installed.
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
