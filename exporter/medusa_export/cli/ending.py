"""SIGTERM ends a command like Ctrl-C: what it was writing is removed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 143  # the exit code that a shell reports for a program that SIGTERM ended: 128 + 15


@contextmanager
def cleanly_on_sigterm() -> Iterator[None]:
    """While open, the first SIGTERM raises `SystemExit`, so that half-written directories are removed; a second one kills.

    A command with a handler of its own, such as `serve`, is not affected.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
