"""How much of the machine other programs use, from Linux's counts of what its cores did."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
USED, NOT_USED = (0, 1, 2, 5, 6, 7), (3, 4)  # columns: user, nice, system, interrupts (2), stolen; idle, waiting for a disk


class OtherPrograms:
    """Counts the cores that other programs use from now on.

    A program that runs all the time makes all steps slower alike. The timings themselves do not show it, this does.

    Args:
        stat: Linux's counts. Each core has a line with the ticks that it spent in each state.
        own_seconds: the CPU time of this process so far.
    """

    def __init__(self, stat: Path = STAT, own_seconds: Callable[[], float] = time.process_time) -> None:
        self._stat, self._own_seconds = stat, own_seconds
        self._before = self._counts()

    def cores(self) -> float | None:
        """Cores that other programs used on average, of those that this process may use. None if that is unknown here."""
        now = self._counts()
        if self._before is None or now is None:
            return None
        used, whole, own = (after - before for after, before in zip(now, self._before, strict=True))
        return max(0.0, used - own) / whole * len(_cores()) if whole > 0 else 0.0

    def _counts(self) -> tuple[float, float, float] | None:
        """Seconds that the cores were used, seconds that they existed, and seconds of this process; None if unknown."""
        try:
            lines = [line.split() for line in self._stat.read_text(encoding="utf-8").splitlines() if line.startswith("cpu")]
        except OSError:
            return None
        names = {f"cpu{core}" for core in _cores()}
        ticks = [[int(word) for word in words] for name, *words in lines if name in names]
        used = sum(row[column] for row in ticks for column in USED)
        whole = used + sum(row[column] for row in ticks for column in NOT_USED)
        per_second = os.sysconf("SC_CLK_TCK")
        return used / per_second, whole / per_second, self._own_seconds()


def _cores() -> set[int]:
    """The numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
