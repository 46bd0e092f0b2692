"""Timing in rounds: which of several timings counts, how noisy the machine is, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LOW = 0.25  # other programs only make steps slower, so the timing that counts is the one that a quarter of the rounds reach
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rounds:
    """How many rounds are timed.

    Args:
        least: rounds that are timed in any case.
        max_noise: more rounds are timed while `noise` is above this.
        max_seconds: but no further round is begun after this time.
    """

    least: int
    max_noise: float = 0.0
    max_seconds: float = 0.0


def low(timings: npt.ArrayLike) -> Seconds:
    """The timing that counts, of each thing that was timed. [rounds, …] -> […]"""
    return np.asarray(np.quantile(np.asarray(timings, np.float64), LOW, axis=0))


def noise(tables: Sequence[npt.ArrayLike]) -> float:
    """How much longer than the timing that counts the median timing is: 0.1 for a tenth. The median over all things timed.

    Args:
        tables: timings of several things in the same rounds. Each [rounds, things]
    """
    found = [np.median(np.asarray(table, np.float64), axis=0) / low(table) - 1 for table in tables]
    return float(np.median(np.concatenate([np.atleast_1d(one) for one in found])))
