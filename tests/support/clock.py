"""A clock that tests set, so that no test depends on how fast the machine is."""

from __future__ import annotations

import time

import pytest


class Clock:
    """Stands for `time.perf_counter`. Each reading takes `tick` seconds, and `advance` lets time pass.

    Args:
        tick: seconds between two readings.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let all code read this clock."""
        monkeypatch.setattr(time, "perf_counter", self)
