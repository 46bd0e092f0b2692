"""How much a command prints to stderr. Results on stdout, and errors, are always printed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from medusa_runtime.errors import OptionError

LEVELS = ("error", "warning", "info", "debug")
USUAL = "info"
OURS = ("medusa_export", "medusa_heads", "medusa_runtime", "medusa_serve")


def wanted(quiet: bool | None, verbose: bool | None, level: str | None) -> str:
    """The level that these options mean.

    Raises:
        OptionError: they contradict each other.
    """
    if quiet and verbose:
        raise OptionError("--quiet and --verbose exclude each other")
    short = "error" if quiet else "debug" if verbose else None
    if short is not None and level is not None and level != short:
        flag = "--quiet" if quiet else "--verbose"
        raise OptionError(f"{flag} means --log-level {short}, but --log-level is {level}; give one")
    return level or short or USUAL


@contextmanager
def verbosity(level: str) -> Iterator[None]:
    """While open, print no more and no less than a level says.

    ``error`` and ``warning`` leave out progress and notes. ``debug`` prints what our packages log, such as what graph passes
    matched. At ``info``, loggers stay as they are.
    """
    if level == USUAL:
        yield
        return
    from medusa_export import progress

    numeric = logging.getLevelName(level.upper())
    loggers = [logging.getLogger(name) for name in OURS]
    before = [log.level for log in loggers]
    handler = _Notes() if level == "debug" else None
    for log in loggers:
        log.setLevel(numeric)
        if handler is not None:
            log.addHandler(handler)
    try:
        with progress.quiet(level != "debug"):
            yield
    finally:
        for log, old in zip(loggers, before, strict=True):
            log.setLevel(old)
            if handler is not None:
                log.removeHandler(handler)


class _Notes(logging.Handler):
    """Prints what is logged as notes among the progress."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:  # a server's own log has it already
            return
        from medusa_export.progress import note

        note(record.getMessage())
