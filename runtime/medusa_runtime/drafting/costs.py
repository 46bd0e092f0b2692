"""The costs of steps on this machine, in seconds: measured in advance, or learned from the steps that are made anyway."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import FloatArray
from medusa_runtime.backends.base import Backend
from medusa_runtime.bundle.files import write_whole
from medusa_runtime.bundle.manifest import Limits
from medusa_runtime.drafting.averages import AverageSeconds, HostWork
from medusa_runtime.drafting.coefficients import Coefficients
from medusa_runtime.drafting.measuring import measure_grid
from medusa_runtime.drafting.rounds import Rounds
from medusa_runtime.errors import BundleError

ROUNDS = 3
LEAST_PART = 0.5  # with fewer entries than were measured, a step is thought to take at least this part of the fewest's time
COST_PRIOR = np.diag([0.5, 0.05, 0.02]) ** 2  # variances of the three coefficients of `LearnedCosts`


class Costs(Protocol):
    """Seconds of steps and of the heads on one machine."""

    @property
    def is_warm(self) -> bool:
        """Whether the costs are more than a guess."""
        ...

    def steps(self, batch: int, capacity: int, max_width: int) -> FloatArray:
        """Seconds of a step of 1, 2 … `max_width` tokens a sequence, with the host's work of a step without drafts. [max_width]

        Args:
            batch: sequences.
            capacity: entries in use in the fullest slot.
            max_width: tokens a sequence.
        """
        ...

    def heads(self, batch: int) -> float:
        """Seconds that one step more takes if the heads are asked: their evaluation, and the host's work with their drafts."""
        ...

    def observe(self, batch: int, width: int, capacity: int, seconds: float) -> None:
        """Learn from the seconds that a step took."""
        ...

    def observe_heads(self, batch: int, seconds: float) -> None:
        """Learn from the seconds that one evaluation of the heads took."""
        ...

    def observe_host(self, batch: int, seconds: float, *, with_heads: bool) -> None:
        """Learn from the seconds of the host's work in a step, whose drafts were the heads' or not."""
        ...


class _BatchCosts(NamedTuple):
    """Seconds with one batch size."""

    steps: npt.NDArray[np.float64]  # of a step of 1, 2 … nodes, without the host's work. [capacities, nodes]
    heads: float
    host: float
    drafts: float


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step on one machine, measured at the points of a grid. Between the points, costs are linear.

    With fewer entries than the first point has, they fall as they do between the first two, to a half at least: with many
    sequences, attention is a large part of a step of one node, so drafts cost more than the first point says.

    Args:
        batch_sizes: ascending.
        widths: nodes a sequence, ascending.
        capacities: entries a slot, ascending.
        step_seconds: nested lists. [capacities, batch_sizes, widths]
        head_seconds: of one evaluation of the heads. [batch_sizes]
        host_seconds: the rest of a step without drafts: acceptance, bookkeeping. Empty if not measured. [batch_sizes]
        draft_seconds: what the heads' drafts add to that: their tree, its mask, its acceptance. Empty if not measured.
            [batch_sizes]
    """

    batch_sizes: list[int]
    widths: list[int]
    capacities: list[int]
    step_seconds: list[list[list[float]]]
    head_seconds: list[float]
    host_seconds: list[float] = field(default_factory=list)
    draft_seconds: list[float] = field(default_factory=list)

    @classmethod
    def measure(
        cls,
        backend: Backend,
        *,
        max_batch_size: int = 8,
        max_nodes: int = 16,
        capacities: Sequence[int] = (256, 1024),
    ) -> StepCosts:
        """Measure a backend. This takes some seconds for a small model. The cache's entries are lost.

        Args:
            backend: must not be used by anything else meanwhile.
            max_batch_size: the largest batch to be decoded.
            max_nodes: the largest tree.
            capacities: sizes of the cache to measure at, in entries per slot; the bundle's limits bound them.
        """
        batch_sizes, widths = _grid(max_batch_size), _grid(fitting_nodes(backend.manifest.limits, max_nodes))
        fitting = fitting_capacities(backend.manifest.limits, capacities, widths[-1])
        grid = measure_grid(backend, batch_sizes, widths, fitting, rounds=Rounds(ROUNDS))
        return cls(batch_sizes, widths, fitting, grid.step_seconds, grid.head_seconds)

    @classmethod
    def load(cls, path: str | Path) -> StepCosts:
        """Read what `save` wrote.

        Raises:
            BundleError: the file is missing or damaged.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            costs = cls(**data)
            costs.check()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} holds no step costs ({error}); measure them again") from error
        return costs

    def check(self) -> None:
        """Raise a ValueError or TypeError if the table is malformed."""
        axes = [np.array(axis, np.float64) for axis in (self.capacities, self.batch_sizes, self.widths)]
        tables = [np.array(table, np.float64) for table in (self.step_seconds, self.head_seconds)]
        host = [np.array(seconds, np.float64) for seconds in (self.host_seconds, self.draft_seconds)]
        if any(axis.ndim != 1 or not len(axis) or (np.diff(axis, prepend=0) <= 0).any() for axis in axes):
            raise ValueError("its axes do not ascend")
        batches = (len(axes[1]),)
        if [table.shape for table in tables] != [tuple(map(len, axes)), batches] or any(
            work.shape not in {(0,), batches} for work in host
        ):
            raise ValueError("its tables are not as large as it says")
        if not all((table > 0).all() for table in tables) or not all((work >= 0).all() for work in host):
            raise ValueError("a step takes no time")

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_whole(Path(path), json.dumps(asdict(self)) + "\n")

    @property
    def is_warm(self) -> bool:
        """See `Costs.is_warm`: they were measured."""
        return True

    def steps(self, batch: int, capacity: int, max_width: int) -> FloatArray:
        """See `Costs.steps`. The host's work is included if it was measured."""
        return np.asarray(self.backend_steps(batch, capacity, max_width) + self.host(batch), np.float32)

    def backend_steps(self, batch: int, capacity: int, max_width: int) -> npt.NDArray[np.float64]:
        """See `Costs.steps`, without the host's work. Nobody may change what it returns. [max_width]"""
        table = self._of_batch(batch, max_width).steps[:, :max_width]
        missing = self.capacities[0] - capacity
        if missing <= 0 or len(self.capacities) == 1:
            return _along(table, self.capacities, capacity)
        slopes = np.maximum(table[1] - table[0], 0) / (self.capacities[1] - self.capacities[0])
        below: npt.NDArray[np.float64] = np.maximum(table[0] - missing * slopes, LEAST_PART * table[0])
        return below

    def host(self, batch: int) -> float:
        """Seconds of the host's work in a step without drafts; 0 if it was not measured."""
        return self._of_batch(batch).host

    def drafts(self, batch: int) -> float:
        """Seconds that the heads' drafts add to the host's work in a step; 0 if they were not measured."""
        return self._of_batch(batch).drafts

    def evaluation(self, batch: int) -> float:
        """Seconds of one evaluation of the heads."""
        return self._of_batch(batch).heads

    def heads(self, batch: int) -> float:
        """See `Costs.heads`."""
        return self.evaluation(batch) + self.drafts(batch)

    def observe(self, batch: int, width: int, capacity: int, seconds: float) -> None:
        """See `Costs.observe`. A table stays as it was measured."""

    def observe_heads(self, batch: int, seconds: float) -> None:
        """See `Costs.observe_heads`. A table stays as it was measured."""

    def observe_host(self, batch: int, seconds: float, *, with_heads: bool) -> None:
        """See `Costs.observe_host`. A table stays as it was measured."""

    @cached_property
    def _by_batch(self) -> dict[int, _BatchCosts]:
        """The costs of each batch size that was asked for: every step asks, and interpolation takes long."""
        return {}

    def _of_batch(self, batch: int, max_width: int = 1) -> _BatchCosts:
        """The costs of a batch size, for steps of 1, 2 … nodes: `max_width` at least."""
        found = self._by_batch.get(batch)
        if found is None or found.steps.shape[1] < max_width:
            found = self._by_batch[batch] = self._interpolated(batch, max(max_width, self.widths[-1]))
        return found

    def _interpolated(self, batch: int, max_width: int) -> _BatchCosts:
        table = np.array(self.step_seconds).swapaxes(0, 1)  # [batch_sizes, capacities, widths]
        known = _along(table, self.batch_sizes, batch)  # [capacities, widths]
        widths = np.arange(1, max_width + 1)
        steps = np.array([np.interp(widths, self.widths, seconds) for seconds in known])
        if len(self.widths) > 1:  # beyond the grid, with the slope at its end
            slopes = (known[:, -1] - known[:, -2]) / (self.widths[-1] - self.widths[-2])
            steps += np.maximum(widths - self.widths[-1], 0) * slopes[:, None]
        steps.flags.writeable = False
        others = (self.head_seconds, self.host_seconds, self.draft_seconds)
        return _BatchCosts(steps, *(float(_along(np.array(one), self.batch_sizes, batch)) if one else 0.0 for one in others))


class LearnedCosts:
    """Costs that are learned from the steps that are made anyway. They start from a guess.

    The model: a step of B sequences with T tokens each on a cache of S entries costs ``a + b·B·T + c·B·T·S``. A Kalman filter
    estimates the three coefficients. It starts from values seen on a CPU, assumes that a timing has an error of a tenth, and
    forgets slowly. The heads' evaluation and the host's work are averages of what they took with the nearest batch size.
    """

    def __init__(self) -> None:
        self._unit = 0.0  # seconds of a step of one token, by the first step seen; the coefficients are relative to it
        self._coefficients = Coefficients(np.array([1.0, 0.05, 0.02]), COST_PRIOR)
        self._head_seconds = AverageSeconds()
        self._host_work = HostWork()

    @property
    def is_warm(self) -> bool:
        """See `Costs.is_warm`: whether a step was seen."""
        return bool(self._unit)

    def steps(self, batch: int, capacity: int, max_width: int) -> FloatArray:
        """See `Costs.steps`."""
        tokens = batch * np.arange(1, max_width + 1)
        features = np.stack([np.ones(max_width), tokens, tokens * capacity / 1000], axis=1)  # [max_width, 3]
        costs = features @ np.maximum(self._coefficients.mean, [0.05, 0.0, 0.0])
        return np.asarray((self._unit or 1.0) * costs + self._host_work.without_drafts(batch), np.float32)

    def heads(self, batch: int) -> float:
        """See `Costs.heads`. Before the first evaluation, it is assumed to take a tenth of a step."""
        return self._head_seconds.get(batch, 0.1 * (self._unit or 1.0)) + self._host_work.of_drafts(batch)

    def observe(self, batch: int, width: int, capacity: int, seconds: float) -> None:
        """See `Costs.observe`. Each of the first hundred steps counts, then every fourth."""
        if not self._coefficients.wants():
            return
        features = np.array([1.0, batch * width, batch * width * capacity / 1000])
        if not self._unit:
            self._unit = seconds / float(features @ self._coefficients.mean)
        self._coefficients.learn(features, seconds / self._unit)

    def observe_heads(self, batch: int, seconds: float) -> None:
        """See `Costs.observe_heads`."""
        self._head_seconds.observe(batch, seconds)

    def observe_host(self, batch: int, seconds: float, *, with_heads: bool) -> None:
        """See `Costs.observe_host`."""
        self._host_work.observe(batch, seconds, with_heads=with_heads)


def fitting_nodes(limits: Limits, max_nodes: int) -> int:
    """The nodes of the largest tree that a bundle takes, at most `max_nodes`."""
    return min(max_nodes, limits.max_tree_nodes or max_nodes, limits.max_seq_len)


def fitting_capacities(limits: Limits, capacities: Sequence[int], max_nodes: int) -> list[int]:
    """Some capacities, changed so that the bundle can have them and a tree of `max_nodes` fits. Ascending."""
    if limits.capacity:
        return [limits.capacity]
    return sorted({max(min(size, limits.max_seq_len), max_nodes) for size in capacities})


def _grid(largest: int) -> list[int]:
    """1, 4, 16 … and the largest: costs between these are close to linear."""
    sizes = [4**power for power in range(largest.bit_length()) if 4**power < largest]
    return [*sizes, largest]


def _along(table: npt.NDArray[np.float64], points: Sequence[int], at: int) -> npt.NDArray[np.float64]:
    """A table's values at a place of its first axis: linear between its points and above them, constant below."""
    if len(points) == 1:
        only: npt.NDArray[np.float64] = table[0]
        return only
    upper = min(max(bisect_left(points, at), 1), len(points) - 1)
    low, high = points[upper - 1], points[upper]
    found: npt.NDArray[np.float64] = table[upper - 1] + max(at - low, 0) / (high - low) * (table[upper] - table[upper - 1])
    return found
