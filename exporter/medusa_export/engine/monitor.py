"""Progress of a TensorRT build on the terminal, and signals that end it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """While open, Ctrl-C or SIGTERM sets an event: an exception must not unwind through C++. It is raised on exit."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield asked
        return

    received: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        received.append(number)
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            raise SystemExit(128 + signal.SIGTERM) if received[0] == signal.SIGTERM else KeyboardInterrupt


def progress_monitor(trt: Any, tell: Callable[[str], None], asked: threading.Event) -> Any:
    """A progress monitor for a builder configuration.

    Args:
        trt: the flavour's module.
        tell: called with the current phase of the build and its progress.
        asked: the build stops once this event is set.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is chosen at run time
        """Reports phases with several steps; the others last only milliseconds."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, _: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if (steps := self.steps.get(phase_name, 0)) > 1:
                tell(f"{phase_name.lower()}, {step + 1} of {steps}")
            return not asked.is_set()

    return Monitor()
