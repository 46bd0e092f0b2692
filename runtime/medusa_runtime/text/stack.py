"""Work that needs a large stack, because a library goes as deep as its input is nested."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
PAGE = 1 << 12
_STARTING = threading.Lock()  # Python has one stack size for all threads of the process that start


def with_stack(num_bytes: int, work: Callable[[], Result]) -> Result:
    """Do some work in a thread of its own that has a stack of this size. Only the part that is used takes memory.

    Args:
        num_bytes: the size of the stack.
        work: its result is returned, and its error is raised.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            done.set_exception(error)

    with _STARTING:
        before = threading.stack_size(-(-num_bytes // PAGE) * PAGE)
        try:
            threading.Thread(target=run, name="medusa-large-stack", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()
