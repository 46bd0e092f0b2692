"""The standard streams: closed ones, broken pipes, and encodings that cannot hold what is printed."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

ESCAPES = "medusa-export-escapes"  # the name of our error handler for encodings
BROKEN_PIPE = 141  # the exit code that a shell reports for a program that SIGPIPE ended: 128 + 13


class _ClosedStdout(io.TextIOBase):
    """Replaces a stdout that was closed before the program started. Printing a result to it is an error, as in other tools."""

    encoding, errors = "utf-8", "strict"

    def write(self, text: str) -> int:
        if text:
            raise OSError(errno.EBADF, "it is closed", "stdout")
        return 0


def prepare() -> None:
    """Make the standard streams usable, even if the caller closed them or their encoding lacks characters.

    Closed descriptors are opened on the null device. Otherwise the next file that is opened would get the descriptor of stdout,
    and a library that prints would write into that file. Characters that an output's encoding lacks are escaped. File names
    that are not valid text are printed as their bytes.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = _ClosedStdout()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    codecs.register_error(ESCAPES, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPES)


def broken_stream() -> str | None:
    """The name of an output that can no longer be written to; None if there is none.

    Its buffered text is dropped, so that Python does not report the error once more at exit.
    """
    found = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            is_broken = _has_no_reader(stream)
        except OSError:
            is_broken = True
        if is_broken:
            found = found or stream.name.strip("<>")
            with suppress(OSError):
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, stream.fileno())
                os.close(descriptor)
    return found


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed. If the stream has no buffer, flushing does not show this."""
    if not hasattr(select, "poll"):  # Windows
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file of the operating system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def holds_unicode() -> bool:
    """Whether stdout's encoding has all Unicode characters."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""Keep bytes of a file name that are not valid text; replace other characters by escapes such as \u65e5."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
