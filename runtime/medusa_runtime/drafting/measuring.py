"""Measuring what steps and heads cost on a backend.

The points of the grid take turns, so that a slow minute of the machine affects all of them alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from medusa_runtime.backends.base import Backend, HeadOutput, StepOutput
from medusa_runtime.drafting.rounds import Rounds, low, noise

CHUNK = 128  # tokens a step while the cache is filled
MARGIN = 1.5  # skip widths that cost MARGIN times what they could ever save


@dataclass(frozen=True)
class MeasuredGrid:
    """The seconds of steps and heads, and how they were measured.

    Args:
        step_seconds: nested lists. [capacities, batch_sizes, widths]
        head_seconds: of one evaluation of the heads. [batch_sizes]
        noise: how much longer the median step took than the seconds given here; see `rounds.noise`.
        rounds: how often each step was timed, at least.
    """

    step_seconds: list[list[list[float]]]
    head_seconds: list[float]
    noise: float
    rounds: int


def measure_grid(
    backend: Backend,
    batch_sizes: Sequence[int],
    widths: Sequence[int],
    capacities: Sequence[int],
    *,
    rounds: Rounds,
    tell: Callable[[int], None] = lambda _: None,
) -> MeasuredGrid:
    """Measure the seconds of steps and of the heads. The cache's entries are lost.

    There is a first round that does not count. Of the others, the low quantile counts: what a quarter of the rounds reach.

    Of a cache of S entries, all are in use but the last ones, which the widest step needs. So backends whose time depends on
    the entries in use and those whose time depends on the allocated entries are both measured at about S.

    A step gives a sequence at most K + 1 tokens. If T nodes cost much more than K + 1 steps of one node, wider steps are not
    measured: their costs are extrapolated with the last slope.

    Args:
        backend: must not be used by anything else during the measurement.
        batch_sizes: B, ascending.
        widths: T, ascending.
        capacities: S, ascending, each at least the largest width.
        rounds: how often each point is measured. The time limit is for the whole grid.
        tell: called with the number of rounds that are done, the first one included; for one sequence, then for several.

    Raises:
        CapacityError: there is no memory for the cache.
    """
    apart = int(batch_sizes[0] == 1)  # there may be a graph of its own for one sequence
    step_seconds: list[list[list[float]]] = [[] for _ in capacities]
    head_seconds: list[float] = []
    noises, counts = [], []
    groups = [group for group in (batch_sizes[:apart], batch_sizes[apart:]) if group]
    each = replace(rounds, max_seconds=rounds.max_seconds / len(groups))
    for group in groups:
        found = _measure(backend, group, widths, capacities, each, tell)
        for place, capacity in enumerate(capacities):
            step_seconds[place] += [_extended(low(found.steps[capacity, batch]).tolist(), widths) for batch in group]
        head_seconds += [float(low(found.heads[batch])) for batch in group]
        noises.append(found.noise)
        counts.append(found.num_rounds)
    backend.resize(1, capacities[0])  # so that the graph for one sequence is open again
    return MeasuredGrid(step_seconds, head_seconds, max(noises), min(counts))


@dataclass
class _Timings:
    """Seconds of steps by capacity and batch, with one row of widths per round; and of the heads by batch, one per round."""

    steps: dict[tuple[int, int], list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    heads: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_rounds: int = 0

    @property
    def noise(self) -> float:
        """See `rounds.noise`."""
        return noise(list(self.steps.values()))


def _measure(
    backend: Backend,
    batch_sizes: Sequence[int],
    widths: Sequence[int],
    capacities: Sequence[int],
    rounds: Rounds,
    tell: Callable[[int], None],
) -> _Timings:
    """Time steps and heads in rounds, until these are enough or the time is over."""
    useful: dict[tuple[int, int], Sequence[int]] = {}  # by capacity and batch: widths that are measured
    timings = _Timings()
    num_filled, number, started, is_late = 0, 0, time.perf_counter(), False
    while number <= rounds.least or not (is_late or timings.noise <= rounds.max_noise):
        for capacity in capacities:
            num_filled = _fill(backend, batch_sizes[-1], capacity, capacity - widths[-1], num_filled)
            for batch in batch_sizes:
                point = (capacity, batch)
                if number == 0:
                    useful[point] = _useful(backend, batch, widths, num_filled)
                    continue
                _step(backend, batch, 1, num_filled)()  # the first step after a change of batch takes longer
                timings.steps[point].append([_seconds(_step(backend, batch, width, num_filled)) for width in useful[point]])
                first = np.zeros(batch, np.int64)
                timings.heads[batch].append(_seconds(partial(backend.propose, first, first)))
        number += 1
        tell(number)
        is_late = time.perf_counter() - started >= rounds.max_seconds
    timings.num_rounds = number - 1
    return timings


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
