"""A clock that tests set, so that no test depends on how fast the machine is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest

from medusa_export.measure.tune import run_tune
from medusa_export.measure.tune.others import OtherPrograms
from medusa_runtime.arrays import IntArray
from medusa_runtime.backends import choosing
from medusa_runtime.backends.base import Backend, HeadOutput, StepOutput


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


class TuningClock(Clock):
    """The clock of `medusa-export tune`: steps and heads of any backend take seconds that are made up, times `factor`.

    Args:
        factor: how much slower the machine is than usual. Tests change it while they tune.
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(tick=1e-6)
        self.factor = factor

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().install(monkeypatch)
        opened = choosing.open_backend

        def open_backend(*args: Any, **options: Any) -> Backend:
            backend: Any = opened(*args, **options)
            step, propose = backend.step, backend.propose

            def timed_step(input_ids: IntArray, *rest: Any, **more: Any) -> StepOutput:
                self.advance(self.factor * (0.01 + 0.0002 * input_ids.size))
                return cast(StepOutput, step(input_ids, *rest, **more))

            def timed_propose(*rest: Any) -> HeadOutput:
                self.advance(self.factor * 0.001)
                return cast(HeadOutput, propose(*rest))

            backend.step, backend.propose = timed_step, timed_propose
            return cast(Backend, backend)

        monkeypatch.setattr(run_tune, "open_backend", open_backend)
        monkeypatch.setattr(run_tune, "OtherPrograms", lambda: OtherPrograms(Path("unknown")))
