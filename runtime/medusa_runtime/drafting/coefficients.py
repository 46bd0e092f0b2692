"""Coefficients of a linear model of costs, estimated from one timing after the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DECAY = 0.998  # the weight of earlier evidence after one more timing; forgotten evidence returns the variance to the prior
MOST_EACH, EVERY = 100, 4  # the first timings count each, later ones every fourth


class Coefficients:
    """A Kalman filter: a timing is the sum of features, each times its coefficient. It forgets slowly.

    Args:
        mean: the coefficients before anything was seen. [n]
        variance: how unsure they are then. [n, n]
    """

    def __init__(self, mean: Floats, variance: Floats) -> None:
        self.mean = mean
        self._covariance = self._prior = variance
        self._num_timings = 0

    def wants(self) -> bool:
        """Count a timing. Returns whether to learn from it: learning takes time itself."""
        self._num_timings += 1
        return self._num_timings <= MOST_EACH or self._num_timings % EVERY == 0

    def learn(self, features: Floats, timing: float) -> None:
        """Learn from a timing, which is assumed to have an error of a tenth.

        Args:
            features: of the timed step. [n]
            timing: in a unit in which a step takes about 1.
        """
        expected = float(features @ self.mean)
        spread = self._covariance @ features
        gain = spread / (float(features @ spread) + (0.1 * expected) ** 2)
        self.mean = self.mean + gain * np.clip(timing - expected, -1.0, 1.0)  # a stall of the machine counts for little
        self._covariance = DECAY * (self._covariance - np.outer(gain, spread)) + (1 - DECAY) * self._prior
