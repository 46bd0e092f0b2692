"""The end of the program: threads that decode are stopped first, then it waits for runs inside native libraries.

A daemon thread that comes back from native code while the interpreter ends is killed there. In the middle of C++ frames that
aborts the whole process.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

PATIENCE = 60.0  # seconds that the end of the interpreter waits at most, and that threads are held back then


class _Runs:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0
        self.is_ending = False


_runs = _Runs()
_stops: list[Callable[[], None]] = []


def before_the_end(stop: Callable[[], None]) -> Callable[[], None]:
    """Have a function called at the end, while native code may still be run: it may wait for threads that do.

    `atexit` calls what was registered last first. With two functions of ours there, the order of imports would decide which
    comes first, and a thread that is held back below would be waited for.
    """
    _stops.append(stop)
    return stop


class native_run:  # noqa: N801 - used as a context, like a function
    """Hold up the end of the interpreter. Once it ends, other threads than the main one stay here until they are killed."""

    def __enter__(self) -> None:
        with _runs.changed:
            if not _runs.is_ending or threading.current_thread() is threading.main_thread():
                _runs.count += 1
                return
        threading.Event().wait(PATIENCE)  # not for ever: somebody may be waiting for this thread
        with _runs.changed:
            _runs.count += 1

    def __exit__(self, *_: object) -> None:
        with _runs.changed:
            _runs.count -= 1
            _runs.changed.notify_all()


@atexit.register
def _end() -> None:
    try:
        for stop in _stops:
            stop()
    finally:  # Ctrl-C may end the first wait, not the second
        with _runs.changed:
            _runs.is_ending = True
            _runs.changed.wait_for(lambda: _runs.count == 0, PATIENCE)


def _start_anew() -> None:
    """In a child of a fork: the threads that were inside a run are not there."""
    global _runs  # noqa: PLW0603 - the lock may be held by a thread that is not there
    _runs = _Runs()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
