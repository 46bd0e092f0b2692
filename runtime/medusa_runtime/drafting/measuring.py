"""Measuring what steps and heads cost on a backend.

The points of the grid take turns, so that a slow minute of the machine affects all of them alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np

from medusa_runtime.backends.base import Backend, HeadOutput, StepOutput

CHUNK = 128  # tokens a step while the cache is filled
MARGIN = 1.5  # skip widths that cost MARGIN times what they could ever save


def measure_grid(
    backend: Backend,
    batch_sizes: Sequence[int],
    widths: Sequence[int],
    capacities: Sequence[int],
    *,
    rounds: int,
    tell: Callable[[int], None] = lambda _: None,
) -> tuple[list[list[list[float]]], list[float]]:
    """Seconds of steps and of the heads: medians over rounds, after one that does not count. The cache's entries are lost.

    Of a cache of S entries, all are in use but the last ones, which the widest step needs. So backends whose time depends on
    the entries in use and those whose time depends on the allocated entries are both measured at about S.

    A step gives a sequence at most K + 1 tokens. If T nodes cost much more than K + 1 steps of one node, wider steps are not
    measured: their costs are extrapolated with the last slope.

    Args:
        backend: must not be used by anything else during the measurement.
        batch_sizes: B, ascending.
        widths: T, ascending.
        capacities: S, ascending, each at least the largest width.
        rounds: measurements of each point.
        tell: called with the number of rounds that are done, the first one included.

    Returns:
        Seconds of a step, [capacities, batch_sizes, widths], and of the heads, [batch_sizes].

    Raises:
        CapacityError: there is no memory for the cache.
    """
    apart = int(batch_sizes[0] == 1)  # there may be a graph of its own for one sequence
    step_seconds: list[list[list[float]]] = [[] for _ in capacities]
    head_seconds: list[float] = []
    groups = [group for group in (batch_sizes[:apart], batch_sizes[apart:]) if group]
    for group in groups:
        is_last = group is groups[-1]
        steps, heads = _measure(backend, group, widths, capacities, rounds=rounds, tell=tell if is_last else lambda _: None)
        for place, capacity in enumerate(capacities):
            rows = [np.median(steps[capacity, batch], axis=0).tolist() for batch in group]
            step_seconds[place] += [_extended(row, widths) for row in rows]
        head_seconds += [median(heads[batch]) for batch in group]
    backend.resize(1, capacities[0])  # so that the graph for one sequence is open again
    return step_seconds, head_seconds


def _measure(
    backend: Backend,
    batch_sizes: Sequence[int],
    widths: Sequence[int],
    capacities: Sequence[int],
    *,
    rounds: int,
    tell: Callable[[int], None],
) -> tuple[dict[tuple[int, int], list[list[float]]], dict[int, list[float]]]:
    """Seconds of steps by capacity and batch, with one row of widths per round; and of the heads by batch, one per round."""
    useful: dict[tuple[int, int], Sequence[int]] = {}  # by capacity and batch: widths that are measured
    steps: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    heads: dict[int, list[float]] = defaultdict(list)
    num_filled = 0
    for number in range(rounds + 1):
        for capacity in capacities:
            num_filled = _fill(backend, batch_sizes[-1], capacity, capacity - widths[-1], num_filled)
            for batch in batch_sizes:
                point = (capacity, batch)
                if number == 0:
                    useful[point] = _useful(backend, batch, widths, num_filled)
                    continue
                _step(backend, batch, 1, num_filled)()  # the first step after a change of batch takes longer
                steps[point].append([_seconds(_step(backend, batch, width, num_filled)) for width in useful[point]])
                first = np.zeros(batch, np.int64)
                heads[batch].append(_seconds(partial(backend.propose, first, first)))
        tell(number + 1)
    return steps, heads


def _useful(backend: Backend, batch: int, widths: Sequence[int], length: int) -> Sequence[int]:
    """The widths up to the first that costs more than it could ever save. A step that was slow is timed a second time."""
    first = 0.0
    for number, width in enumerate(widths, start=1):
        step = _step(backend, batch, width, length)
        seconds = min(_seconds(step), _seconds(step)) if number < 3 else _seconds(step)
        first = first or seconds
        limit = MARGIN * (backend.manifest.heads.num_heads + 1) * first
        if number > 1 and seconds > limit and _seconds(step) > limit:
            return widths[:number]
    return widths


def _extended(seconds: list[float], widths: Sequence[int]) -> list[float]:
    """Seconds of all widths, extrapolated from the first ones with their last slope."""
    known = len(seconds)
    if known == len(widths):
        return seconds
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (widths[known - 1] - widths[known - 2]))
    return [*seconds, *(seconds[-1] + slope * (width - widths[known - 1]) for width in widths[known:])]


def _fill(backend: Backend, num_slots: int, capacity: int, length: int, num_filled: int) -> int:
    """Fill all slots with `length` entries; `num_filled` are there already. Zeros would be read faster than real entries."""
    kept = min(length, num_filled)
    backend.resize(num_slots, capacity, [kept] * num_slots if kept else ())
    chunk = min(CHUNK, backend.manifest.limits.max_prefill_tokens or CHUNK)
    for start in range(kept, length, chunk):
        _step(backend, 1, min(chunk, length - start), start, num_rows=1)()
    for slot in range(1, num_slots):
        backend.copy(0, slot, length)
    return length


def _step(backend: Backend, batch: int, width: int, length: int, num_rows: int | None = None) -> Callable[[], StepOutput]:
    """A step that evaluates its first rows, or all of them."""
    rows = np.tile(np.arange(width), (batch, 1))  # [B, T]
    mask = np.tile(np.tri(width, dtype=np.bool_), (batch, 1, 1))
    ids, lengths = np.zeros((batch, width), np.int64), np.full(batch, length)
    return partial(backend.step, ids, length + rows, mask, lengths, rows[:, :num_rows])


def _seconds(run: Callable[[], StepOutput | HeadOutput]) -> float:
    """Seconds of a run, after the backend has compiled or captured its shape."""
    while True:
        started = time.perf_counter()
        output = run()
        seconds = time.perf_counter() - started
        if not isinstance(output, StepOutput) or output.is_warm:
            return seconds
