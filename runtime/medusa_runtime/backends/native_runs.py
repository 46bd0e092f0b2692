"""Runs inside ONNX Runtime, whose end the interpreter waits for.

A daemon thread that comes back from native code while the interpreter ends is killed there. In the middle of C++ frames that
aborts the whole process.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 60.0  # seconds that the end of the interpreter waits at most


class _Runs:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0
        self.is_ending = False


_runs = _Runs()


@contextmanager
def native_run() -> Iterator[None]:
    """Hold up the end of the interpreter. Once it ends, other threads than the main one stay here until they are killed."""
    with _runs.changed:
        must_stay = _runs.is_ending and threading.current_thread() is not threading.main_thread()
        _runs.count += not must_stay
    if must_stay:
        threading.Event().wait()
    try:
        yield
    finally:
        with _runs.changed:
            _runs.count -= 1
            _runs.changed.notify_all()


@atexit.register
def _wait() -> None:
    with _runs.changed:
        _runs.is_ending = True
        _runs.changed.wait_for(lambda: _runs.count == 0, PATIENCE)


def _start_anew() -> None:
    """In a child of a fork: the threads that were inside a run are not there."""
    global _runs  # noqa: PLW0603 - the lock may be held by a thread that is not there
    _runs = _Runs()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
