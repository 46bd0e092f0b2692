"""Costs that were measured earlier, corrected by the steps that are made now."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.averages import HostWork, moving_average
from medusa_runtime.drafting.coefficients import Coefficients
from medusa_runtime.drafting.costs import StepCosts

PRIOR = 0.3**2 * np.array([[1.0, 0.8], [0.8, 1.0]])  # variances of the two factors: most often, both are wrong alike
LEAST = 0.05  # no factor falls below this


class CorrectedCosts:
    """A measured table whose steps are corrected by what steps take now.

    Other programs may have used the machine while the table was measured, or may use it now. The table still says how costs
    depend on batch, nodes and cache. Two factors are learned: of a step of one node, and of what further nodes add to it. They
    start at 1 and move together until steps of several widths tell them apart. So narrow steps also correct the costs of wide
    ones that were never tried. The heads' evaluation has a factor of its own. The host's work is what it was in the steps that
    were made; before these, as it was measured, with the factor of a step of one node.

    Args:
        table: the costs as they were measured. They stay as they are.
    """

    def __init__(self, table: StepCosts) -> None:
        self.table = table
        self._factors = Coefficients(np.ones(2), PRIOR)
        self._head_factor = 1.0
        self._host_work = HostWork()

    @property
    def is_warm(self) -> bool:
        """See `Costs.is_warm`: they were measured."""
        return True

    def steps(self, batch: int, capacity: int, max_width: int) -> FloatArray:
        """See `Costs.steps`."""
        seconds = self.table.backend_steps(batch, capacity, max_width)
        first = float(seconds[0])
        one, more = (max(factor, LEAST) for factor in self._factors.mean.tolist())
        further = np.maximum(seconds - first, 0.0)  # what 0, 1 … further nodes add
        host = self._host_work.without_drafts(batch, one * self.table.host(batch))
        corrected: FloatArray = (one * first + more * further + host).astype(np.float32)
        return corrected

    def heads(self, batch: int) -> float:
        """See `Costs.heads`."""
        one = max(float(self._factors.mean[0]), LEAST)
        drafts = self._host_work.of_drafts(batch, one * self.table.drafts(batch))
        return self._head_factor * self.table.evaluation(batch) + drafts

    def observe(self, batch: int, width: int, capacity: int, seconds: float) -> None:
        """See `Costs.observe`. Each of the first hundred steps counts, then every fourth."""
        if self._factors.wants():
            expected = self.table.backend_steps(batch, capacity, width)
            first, whole = float(expected[0]), float(max(expected[0], expected[-1]))
            self._factors.learn(np.array([first, whole - first]) / whole, seconds / whole)

    def observe_heads(self, batch: int, seconds: float) -> None:
        """See `Costs.observe_heads`."""
        factor = min(seconds / self.table.evaluation(batch), 2 * self._head_factor)
        self._head_factor = max(moving_average(self._head_factor, factor), LEAST)

    def observe_host(self, batch: int, seconds: float, *, with_heads: bool) -> None:
        """See `Costs.observe_host`."""
        self._host_work.observe(batch, seconds, with_heads=with_heads)

    def save(self, path: str | Path) -> None:
        """Write the table as it was measured. See `StepCosts.save`."""
        self.table.save(path)
