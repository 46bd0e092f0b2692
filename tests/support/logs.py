"""What the runtime logs. pytest's own capturing is off: it would change what programs print."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def recorded(name: str = "medusa_runtime") -> Iterator[list[logging.LogRecord]]:
    """The records of a logger and those below it, while the block runs."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger(name)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield records
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
