"""How many drafts a step should verify: what they are expected to gain against what the step costs here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_runtime.backends.base import Backend
from medusa_runtime.errors import BundleError
from medusa_runtime.files import write_whole
from medusa_runtime.tree import FloatArray

REPEATS = 3
DECAY = 0.98  # how much of what was learnt of the heads from earlier steps remains after one more
DECAY_OF_COSTS = 0.998  # how much of what was learnt of the costs remains; what is forgotten is as unsure as in the beginning
PRIOR = np.diag([0.5, 0.05, 0.02]) ** 2
MOVE = 0.1  # how far a moving average goes to a new value
PAUSE = 16  # steps without drafts until the heads are asked again


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step on one machine, measured at a grid of points; between them costs are taken as linear.

    Args:
        batch_sizes: ascending.
        widths: nodes a sequence, ascending.
        capacities: entries a slot, ascending.
        step_seconds: nested lists. [capacities, batch_sizes, widths]
        head_seconds: of one evaluation of the heads. [batch_sizes]
    """

    batch_sizes: list[int]
    widths: list[int]
    capacities: list[int]
    step_seconds: list[list[list[float]]]
    head_seconds: list[float]

    @classmethod
    def measure(
        cls,
        backend: Backend,
        *,
        max_batch_size: int = 8,
        max_nodes: int = 16,
        capacities: Sequence[int] = (256, 1024),
    ) -> StepCosts:
        """Measure a backend, which takes some seconds for a small model. What its cache held is lost.

        Args:
            backend: nobody else may use it meanwhile.
            max_batch_size: the largest batch to be decoded.
            max_nodes: the largest tree.
            capacities: how large the cache may be; the bundle's limits cut them.
        """
        limits = backend.manifest.limits
        max_nodes = min(max_nodes, limits.max_tree_nodes or max_nodes)
        fitting = [limits.capacity] if limits.capacity else sorted({min(size, limits.max_seq_len) for size in capacities})
        fitting = sorted({max(size, max_nodes) for size in fitting})
        batch_sizes, widths = _grid(max_batch_size), _grid(max_nodes)
        step_seconds: list[list[list[float]]] = []
        head_seconds: list[float] = []
        for capacity in fitting:
            backend.resize(max_batch_size, capacity)
            table = []
            for batch in batch_sizes:
                table.append([_seconds(_step(backend, batch, width, capacity)) for width in widths])
                if len(head_seconds) < len(batch_sizes):
                    head_seconds.append(_seconds(partial(backend.propose, np.zeros(batch, np.int64))))
            step_seconds.append(table)
        return cls(batch_sizes, widths, fitting, step_seconds, head_seconds)

    @classmethod
    def load(cls, path: str | Path) -> StepCosts:
        """Read what `save` wrote.

        Raises:
            BundleError: the file is missing or damaged.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text())
            costs = cls(**data)
            axes = [np.array(axis, np.float64) for axis in (costs.capacities, costs.batch_sizes, costs.widths)]
            tables = [np.array(table, np.float64) for table in (costs.step_seconds, costs.head_seconds)]
            if any(axis.ndim != 1 or not len(axis) or (np.diff(axis, prepend=0) <= 0).any() for axis in axes):
                raise ValueError("its axes do not ascend")
            if [table.shape for table in tables] != [tuple(map(len, axes)), (len(axes[1]),)]:
                raise ValueError("its tables are not as large as it says")
            if not all((table > 0).all() for table in tables):
                raise ValueError("a step that takes no time")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} holds no step costs ({error}); measure them again") from error
        return costs

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_whole(Path(path), json.dumps(asdict(self)) + "\n")

    def steps(self, batch: int, capacity: int, max_width: int) -> FloatArray:
        """Seconds of a step of 1, 2 … `max_width` nodes. [max_width]"""
        table = np.array(self.step_seconds)  # [capacities, batch_sizes, widths]
        by_batch = _along(table, self.capacities, capacity)
        by_width = _along(by_batch, self.batch_sizes, batch)
        widths = np.arange(1, max_width + 1)
        inside = np.interp(widths, self.widths, by_width)
        if len(self.widths) > 1:  # beyond the grid, as steep as at its end
            slope = (by_width[-1] - by_width[-2]) / (self.widths[-1] - self.widths[-2])
            inside += np.maximum(widths - self.widths[-1], 0) * slope
        return np.asarray(inside, np.float32)

    def heads(self, batch: int) -> float:
        """Seconds of one evaluation of the heads."""
        return float(_along(np.array(self.head_seconds), self.batch_sizes, batch))

    def observe(self, batch: int, width: int, capacity: int, seconds: float) -> None:
        """See `LearnedCosts.observe`. A table stays as it was measured."""

    def observe_heads(self, batch: int, seconds: float) -> None:
        """See `LearnedCosts.observe_heads`."""


class LearnedCosts:
    """What steps cost here, learned from the steps that are made anyway. In the meantime, a guess.

    A step of B sequences with T nodes on a cache of S entries is taken to cost ``a + b·B·T + c·B·T·S``. The three are
    estimated by a Kalman filter: it starts from what a CPU shows, believes a step's time to a tenth, and forgets slowly.
    """

    def __init__(self) -> None:
        self._unit = 0.0  # seconds of a step of one token, by the first step seen; the rest is relative to it
        self._mean = np.array([1.0, 0.05, 0.02])
        self._covariance = PRIOR
        self._head_seconds: dict[int, float] = {}  # by batch size
        self._num_steps = 0

    def steps(self, batch: int, capacity: int, max_width: int) -> FloatArray:
        """See `StepCosts.steps`."""
        tokens = batch * np.arange(1, max_width + 1)
        features = np.stack([np.ones(max_width), tokens, tokens * capacity / 1000], axis=1)  # [max_width, 3]
        costs = features @ np.maximum(self._mean, [0.05, 0.0, 0.0])
        return np.asarray((self._unit or 1.0) * costs, np.float32)

    def heads(self, batch: int) -> float:
        """See `StepCosts.heads`. What was not seen yet is taken to cost a tenth of a step."""
        if not self._head_seconds:
            return 0.1 * (self._unit or 1.0)
        nearest = min(self._head_seconds, key=lambda seen: abs(seen - batch))
        return self._head_seconds[nearest]

    def observe(self, batch: int, width: int, capacity: int, seconds: float) -> None:
        """Learn from a step: from each of the first ones, then from every fourth."""
        self._num_steps += 1
        if self._num_steps > 100 and self._num_steps % 4:
            return
        features = np.array([1.0, batch * width, batch * width * capacity / 1000])
        if not self._unit:
            self._unit = seconds / float(features @ self._mean)
        surprise = seconds / self._unit - float(features @ self._mean)
        spread = self._covariance @ features
        gain = spread / (float(features @ spread) + (0.1 * float(features @ self._mean)) ** 2)
        self._mean = self._mean + gain * np.clip(surprise, -1.0, 1.0)  # a stall of the machine is no lesson
        self._covariance = DECAY_OF_COSTS * (self._covariance - np.outer(gain, spread)) + (1 - DECAY_OF_COSTS) * PRIOR

    def observe_heads(self, batch: int, seconds: float) -> None:
        """Learn from an evaluation of the heads."""
        before = self._head_seconds.get(batch, seconds)
        self._head_seconds[batch] = _moved(before, min(seconds, 2 * before))


class DraftBudget:
    """Chooses the width of each step, and whether the heads are asked at all, so that the tokens a second are most.

    The heads' probabilities say how many of the N likeliest candidates will be accepted; what is accepted in fact corrects
    them. With r the tokens a second that can be had here, a step of N nodes that gives g tokens in s seconds is worth
    g - r·s: what it gives beyond what its time would give otherwise. The width is the one worth most. Asking the heads is
    worth what the best width has over a root alone; where that is less than their time, they rest, and are tried again
    now and then.

    Args:
        costs: what steps cost here.
    """

    def __init__(self, costs: StepCosts | LearnedCosts) -> None:
        self._costs = costs
        self._expected = self._accepted = 8.0  # decaying sums: drafts that the heads expected to be accepted, and that were
        self._now_expected = 0.0
        self._speedup = 1.0  # of the tokens a second over those without drafts
        self._worth: dict[int, float] = {}  # by batch size: what asking the heads is worth, in the time that it takes
        self._resting = 0

    def width(self, probabilities: Sequence[FloatArray], least: int, capacity: int) -> int:
        """Nodes that the next step should verify for each sequence at most.

        Args:
            probabilities: for each sequence those of its drafts, likeliest first; none where the heads did not choose them.
            least: nodes that some sequence has to have.
            capacity: entries a slot has now.
        """
        batch, longest = len(probabilities), max(len(chances) for chances in probabilities)
        if longest == 0:  # the heads were not asked
            self._now_expected = 0.0
            return least
        most = max(least, 1 + longest)
        expected = np.zeros(most)  # [N] drafts of a step of 1, 2 … nodes that the heads expect to be accepted
        for chances in probabilities:
            sums = np.cumsum(chances)
            expected[1 : len(sums) + 1] += sums
            expected[len(sums) + 1 :] += sums[-1] if len(sums) else 0.0
        seconds, head_seconds = self._costs.steps(batch, capacity, most), self._costs.heads(batch)
        tokens = batch + self._accepted / self._expected * expected
        plain_rate = batch / float(seconds[0])
        rate = plain_rate * max(self._speedup, 1.0)
        worth = tokens - rate * seconds
        width = least + int(worth[least - 1 :].argmax())
        self._now_expected = float(expected[width - 1])
        gained = float(worth[width - 1] - worth[0]) / (rate * head_seconds)
        self._worth[batch] = _moved(self._worth.get(batch, gained), gained)
        now = float(tokens[width - 1]) / (float(seconds[width - 1]) + head_seconds)
        self._speedup = _moved(self._speedup, now / plain_rate)
        return width

    def asks_heads(self, batch: int, width: int, num_accepted: int) -> bool:
        """Learn from a step, and say whether the heads are asked after it.

        Args:
            batch: sequences.
            width: nodes it verified for each of them.
            num_accepted: drafts accepted, of those that the heads chose.
        """
        if width > 1:
            self._expected = DECAY * self._expected + self._now_expected
            self._accepted = DECAY * self._accepted + num_accepted
        if self._worth.get(batch, 1.0) >= 1.0:
            return True
        self._resting = (self._resting + 1) % PAUSE
        return self._resting == 0


def _moved(average: float, value: float) -> float:
    return average + MOVE * (value - average)


def likeliest(scores: FloatArray, num_nodes: int) -> FloatArray:
    """Probabilities of the drafts that a tree of so many nodes would hold, likeliest first. scores: `CandidateSet.scores`'."""
    chances: FloatArray = np.exp(np.sort(scores[1:])[::-1][: num_nodes - 1])
    return chances


def _grid(largest: int) -> list[int]:
    """1, 4, 16 … and the largest: what lies between is close to linear."""
    sizes = [4**power for power in range(largest.bit_length()) if 4**power < largest]
    return [*sizes, largest]


def _step(backend: Backend, batch: int, width: int, capacity: int) -> Callable[[], object]:
    cached = max(min(capacity // 2, capacity - width), 0)
    rows = np.tile(np.arange(width), (batch, 1))  # [B, T]
    mask = np.tile(np.tri(width, dtype=np.bool_), (batch, 1, 1))
    return partial(backend.step, np.zeros((batch, width), np.int64), cached + rows, mask, np.full(batch, cached), rows)


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of some runs after the first: what disturbs a run only makes it slower."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _along(table: npt.NDArray[np.float64], points: Sequence[int], at: int) -> npt.NDArray[np.float64]:
    """A table's values at a place of its first axis: linear between its points and above them, constant below."""
    if len(points) == 1:
        only: npt.NDArray[np.float64] = table[0]
        return only
    upper = int(np.clip(np.searchsorted(points, at), 1, len(points) - 1))
    low, high = points[upper - 1], points[upper]
    found: npt.NDArray[np.float64] = table[upper - 1] + max(at - low, 0) / (high - low) * (table[upper] - table[upper - 1])
    return found
